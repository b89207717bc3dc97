"""Blocks of a model, as merges (MBW) and LoRAs (LBW) name them, and a block weight for each.

    BASE            text encoders and autoencoder
    IN00, IN01 …    input_blocks of the UNet; IN00 with the embeddings of time and size
    M00             middle_block
    OUT00 …         output_blocks; the last one with `out`

SD 1 and 2 have 26 blocks, SDXL 20.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ldm.runtime.errors import ArgumentError

__all__ = ["BASE", "Blocks", "list_blocks"]

BASE, MIDDLE = "BASE", "M00"
NUMBERED_BLOCK = re.compile(r"(?:unet\.)?(input|output)_blocks\.(\d+)\.")
BLOCK_LABELS = {"input": "IN", "output": "OUT"}
# Prefixes of layers outside the numbered blocks, which belong to the first, middle or last one.
FIRST_PREFIXES, MIDDLE_PREFIX, LAST_PREFIX = ("time_embed", "label_emb"), "middle_block.", "out."
TRANSFORMER_LAYER = ".transformer_blocks."


@dataclass(frozen=True)
class Blocks:
    """The blocks of one UNet.

    Args:
        names: All of them, in the order BASE, IN00 …, M00, OUT00 ….
        attention_names: BASE and the blocks with transformers: all that most LoRAs change.
    """

    names: tuple[str, ...]
    attention_names: tuple[str, ...]

    def get_block(self, name: str) -> str:
        """Return the block of a weight or layer, by our name; its prefix `unet.` is optional."""
        if match := NUMBERED_BLOCK.match(name):
            return f"{BLOCK_LABELS[match[1]]}{int(match[2]):02}"
        inner = name.removeprefix("unet.")
        if inner.startswith(FIRST_PREFIXES):
            return "IN00"
        if inner.startswith(LAST_PREFIX):
            return self.names[-1]
        return MIDDLE if inner.startswith(MIDDLE_PREFIX) else BASE

    def parse_weights(
        self, text: str, default: float, argument: str, *, is_lora: bool = False
    ) -> dict[str, float]:
        """Return the weight of each block.

        Args:
            text: Weights of all blocks, or all but BASE, or `NAME=WEIGHT`; separated by commas.
            default: Weight of blocks without one in the text.
            argument: Name of the argument that the text was passed as, for errors.
            is_lora: Whether the weights may also be those of `attention_names` alone.
        """
        entries = [entry.strip() for entry in text.split(",")]
        if all("=" in entry for entry in entries):
            weights: dict[str, float] = {}
            for entry in entries:
                name, _, number = entry.partition("=")
                block = name.strip().upper()
                if block not in self.names:
                    message = f"the model has no block {block}, it has {_abbreviate(self.names)}"
                    raise ArgumentError(message, argument)
                if block in weights:
                    raise ArgumentError(f"block {block} has two weights", argument)
                weights[block] = _parse_number(number.strip(), argument)
            return dict.fromkeys(self.names, default) | weights
        numbers = [_parse_number(entry, argument) for entry in entries]
        orders = [self.names, self.names[1:]]
        if is_lora:
            orders.append(self.attention_names)
        for names in orders:
            if len(numbers) == len(names):
                return dict.fromkeys(self.names, default) | dict(zip(names, numbers, strict=True))
        allowed = ", ".join(f"{len(names)} ({names[0]} … {names[-1]})" for names in orders)
        message = f"{len(numbers)} block weights, this model takes {allowed}"
        raise ArgumentError(message, argument)


def list_blocks(names: Iterable[str]) -> Blocks:
    """Find the blocks of a model by the names of its weights, or of its UNet's weights."""
    counts = {"input": 0, "output": 0}
    with_attention = {BASE}
    for name in names:
        if match := NUMBERED_BLOCK.match(name):
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
            if TRANSFORMER_LAYER in name:
                with_attention.add(f"{BLOCK_LABELS[match[1]]}{int(match[2]):02}")
        elif name.removeprefix("unet.").startswith(MIDDLE_PREFIX) and TRANSFORMER_LAYER in name:
            with_attention.add(MIDDLE)
    numbered = {
        side: [f"{BLOCK_LABELS[side]}{number:02}" for number in range(count)]
        for side, count in counts.items()
    }
    blocks = (BASE, *numbered["input"], MIDDLE, *numbered["output"])
    return Blocks(blocks, tuple(block for block in blocks if block in with_attention))


def _parse_number(text: str, argument: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"the block weight `{text}` is not a number", argument)
    return value


def _abbreviate(names: Sequence[str]) -> str:
    """List names, shortened to `IN00 … IN11` where only the number differs."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rstrip("0123456789"), []).append(name)
    return ", ".join(g[0] if len(g) == 1 else f"{g[0]} … {g[-1]}" for g in groups.values())
