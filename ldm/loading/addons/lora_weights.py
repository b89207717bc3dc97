"""The weight of a LoRA for text encoders, UNet and its blocks, in the syntax of A1111.

    0.8                     for UNet and text encoders
    0.5:1                   0.5 for the text encoders, 1 for the UNet
    0.5:1:8                 the same, with the first 8 ranks only
    te=0.5:unet=1:dyn=8     the same, in any order; te defaults to 1, unet to te
    1:lbw=1,0,0,0,1,…       multiplied by block weights, see `Blocks.parse_weights`

Does not import torch, as the command line uses it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat, Union

from ldm.loading.blocks import BASE_BLOCK, Blocks
from ldm.runtime.errors import ArgumentError

__all__ = ["LoRAWeight", "LoRAWeightLike", "split_weight"]

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
ENTRY = rf"(?:{NUMBER}|[^:=,]*,[^:]*|(?:te|unet|dyn|lbw)=[^:]*)"
NAME_AND_WEIGHT = re.compile(rf"(.+?)((?::{ENTRY})*)", re.IGNORECASE | re.DOTALL)
POSITIONAL_KEYS = ("te", "unet", "dyn")


@dataclass(frozen=True)
class LoRAWeight:
    """The weight of one LoRA: the factor of its changes.

    Args:
        text: Weight for the text encoders.
        unet: Weight for the UNet.
        rank: Number of ranks to use, the first ones; None = all.
        blocks: Block weights that multiply `unet`, or for BASE `text`, in the syntax of
            `Blocks.parse_weights`; "" = 1 for all blocks.
    """

    text: float = 1.0
    unet: float = 1.0
    rank: int | None = None
    blocks: str = ""

    @classmethod
    def parse(cls, value: Union[float, str, "LoRAWeight"]) -> "LoRAWeight":
        """Return the weight for a number, or for a text as in the docstring of this module.

        Raises:
            ArgumentError: The text is not a valid weight.
        """
        if isinstance(value, LoRAWeight):
            return value
        if not isinstance(value, str):
            if not isinstance(value, SupportsFloat) or not math.isfinite(value):
                message = f"the weight of a LoRA must be a finite number, got {value!r}"
                raise ArgumentError(message, "lora")
            return cls(float(value), float(value))
        entries: dict[str, str] = {}
        keys = iter(POSITIONAL_KEYS)
        for entry in value.split(":"):
            key, equals, number = (text.strip() for text in entry.partition("="))
            if "," in entry and key.lower() != "lbw":
                key, number = "lbw", entry
            elif not equals:
                key, number = next(keys, ""), key
            key = key.lower()
            if key not in (*POSITIONAL_KEYS, "lbw") or key in entries:
                message = (
                    f"`{value}` is not the weight of a LoRA, such as 0.8, 0.5:1 or te=1:unet=0"
                )
                raise ArgumentError(message, "lora")
            entries[key] = number
        text = _parse_number(entries.get("te"), value, 1.0)
        unet = _parse_number(entries.get("unet"), value, text)
        rank = entries.get("dyn")
        if rank is not None and not (rank.isdecimal() and int(rank) > 0):
            raise ArgumentError(f"`{value}`: dyn `{rank}` is not a positive whole number", "lora")
        return cls(text, unet, None if rank is None else int(rank), entries.get("lbw", ""))

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        numbers = [self.text] if self.text == self.unet else [self.text, self.unet]
        words = [f"{number!r}".removesuffix(".0") for number in numbers]
        words += [] if self.rank is None else [f"dyn={self.rank}"]
        return ":".join([*words, *([f"lbw={self.blocks}"] if self.blocks else [])])

    def to_json(self) -> float | str:
        """Return a number, if it is the weight of all layers, else the text that `parse` reads."""
        is_number = self == LoRAWeight(self.text, self.text)
        return self.text if is_number else str(self)

    def compute_block_weights(self, blocks: Blocks) -> Mapping[str, float]:
        """Return the weight for each block of a model.

        Raises:
            ArgumentError: The block weights do not fit the blocks of the model.
        """
        weights = dict.fromkeys(blocks.names, 1.0)
        if self.blocks:
            weights = blocks.parse_weights(self.blocks, 1.0, "lora", is_lora=True)
        return {b: w * (self.text if b == BASE_BLOCK else self.unet) for b, w in weights.items()}


LoRAWeightLike = float | str | LoRAWeight  # what `LoRAWeight.parse` takes


def split_weight(argument: str) -> tuple[str, str]:
    """Split NAME[:WEIGHT] into (name, weight or ""); the name may contain colons."""
    match = NAME_AND_WEIGHT.fullmatch(argument)
    assert match is not None or not argument
    return (match[1], match[2].removeprefix(":")) if match else ("", "")


def _parse_number(text: str | None, weight: str, default: float) -> float:
    if text is None:
        return default
    if not re.fullmatch(NUMBER, text, re.IGNORECASE) or not math.isfinite(float(text)):
        raise ArgumentError(f"`{weight}`: `{text}` is not a number", "lora")
    return float(text)
