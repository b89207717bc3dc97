"""Strength of a LoRA: of text towers, UNet and its blocks, as A1111 and its extensions write it.

    0.8                         of all
    0.5:1                       of text towers 0.5, of the UNet 1
    0.5:1:8                     the same, of the first 8 ranks alone
    te=0.5:unet=1:dyn=8         the same, in any order; TEXT is 1 by default, UNET is TEXT
    1:lbw=1,0,0,0,1,…           times a number for each block, see `Blocks.parse`

Nothing here imports torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Union

from ldm.loading.blocks import BASE, Blocks
from ldm.runtime.errors import ArgumentError

__all__ = ["LoRAWeight", "split_weight"]

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
PART = rf"(?:{NUMBER}|[^:=,]*,[^:]*|(?:te|unet|dyn|lbw)=[^:]*)"
WEIGHTED = re.compile(rf"(.+?)((?::{PART})*)", re.IGNORECASE | re.DOTALL)
POSITIONS = ("te", "unet", "dyn")


@dataclass(frozen=True)
class LoRAWeight:
    """The strength of one LoRA.

    Args:
        text: Of the changes of text towers.
        unet: Of those of the UNet.
        rank: How many ranks are used, the first ones; None for all.
        blocks: Numbers of the blocks, which the others are multiplied by (that of BASE is of text
            towers), as `Blocks.parse` reads them; "" for 1.
    """

    text: float = 1.0
    unet: float = 1.0
    rank: int | None = None
    blocks: str = ""

    @classmethod
    def of(cls, value: Union[float, str, "LoRAWeight"]) -> "LoRAWeight":
        """Return the weight of a number, or of a text; see the top of this file.

        Raises:
            ArgumentError: the text is none.
        """
        if isinstance(value, LoRAWeight):
            return value
        if not isinstance(value, str):
            return cls(float(value), float(value))
        parts: dict[str, str] = {}
        names = iter(POSITIONS)
        for part in value.split(":"):
            name, equals, number = (text.strip() for text in part.partition("="))
            if "," in part and name.lower() != "lbw":
                name, number = "lbw", part
            elif not equals:
                name, number = next(names, ""), name
            name = name.lower()
            if name not in (*POSITIONS, "lbw") or name in parts:
                message = (
                    f"`{value}` is not the weight of a LoRA, such as 0.8, 0.5:1 or te=1:unet=0"
                )
                raise ArgumentError(message, "lora")
            parts[name] = number
        text = _number(parts.get("te"), value, 1.0)
        unet = _number(parts.get("unet"), value, text)
        rank = parts.get("dyn")
        if rank is not None and not (rank.isdigit() and int(rank) > 0):
            raise ArgumentError(f"`{value}`: dyn `{rank}` is not a positive whole number", "lora")
        return cls(text, unet, None if rank is None else int(rank), parts.get("lbw", ""))

    def __str__(self) -> str:
        """Return the text that `of` reads."""
        numbers = [self.text] if self.text == self.unet else [self.text, self.unet]
        words = [f"{number!r}".removesuffix(".0") for number in numbers]
        words += [] if self.rank is None else [f"dyn={self.rank}"]
        return ":".join([*words, *([f"lbw={self.blocks}"] if self.blocks else [])])

    def to_json(self) -> float | str:
        """Return a number if that says it, else the text."""
        is_number = self == LoRAWeight(self.text, self.text)
        return self.text if is_number else str(self)

    def of_blocks(self, blocks: Blocks) -> Mapping[str, float]:
        """Return the factor of each block of a UNet.

        Raises:
            ArgumentError: the numbers are not for this UNet.
        """
        if not self.blocks:
            return dict.fromkeys(blocks.names, 1.0)
        return blocks.parse(self.blocks, 1.0, "lora", adapter=True)

    def strength(self, factors: Mapping[str, float], block: str, *, is_text: bool) -> float:
        """Return the strength in a block, or in a text tower."""
        return self.text * factors[BASE] if is_text else self.unet * factors[block]


def split_weight(argument: str) -> tuple[str, str]:
    """Split NAME[:WEIGHT] into name and weight; a colon may also be part of the name.

    Returns:
        (name, weight), the weight "" if there is none.
    """
    match = WEIGHTED.fullmatch(argument)
    assert match is not None or not argument
    return (match[1], match[2].removeprefix(":")) if match else ("", "")


def _number(text: str | None, weight: str, default: float) -> float:
    if text is None:
        return default
    if not re.fullmatch(NUMBER, text, re.IGNORECASE):
        raise ArgumentError(f"`{weight}`: `{text}` is not a number", "lora")
    return float(text)
