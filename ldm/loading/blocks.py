"""Blocks of a model, as merges (MBW) and LoRAs (LBW) name them, and a block weight for each.

    BASE            text encoders and autoencoder
    IN00, IN01 …    input_blocks of the UNet; IN00 includes the embeddings of timestep and size
    M00             middle_block
    OUT00 …         output_blocks; the last one includes `out`

SD 1 and 2 have 26 blocks, SDXL 20.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ldm.runtime.errors import ArgumentError

__all__ = ["BASE_BLOCK", "Blocks", "list_blocks"]

BASE_BLOCK, MIDDLE_BLOCK = "BASE", "M00"
NUMBERED_BLOCK = re.compile(r"(?:unet\.)?(input|output)_blocks\.(\d+)\.")
BLOCK_LABELS = {"input": "IN", "output": "OUT"}
# Prefixes of layers outside the numbered blocks: of the first, middle and last block.
FIRST_PREFIXES, MIDDLE_PREFIX, LAST_PREFIX = ("time_embed", "label_emb"), "middle_block.", "out."
TRANSFORMER_LAYER = ".transformer_blocks."


@dataclass(frozen=True)
class Blocks:
    """The blocks of one UNet.

    Args:
        names: All names, in the order BASE, IN00 …, M00, OUT00 ….
        attention_names: BASE and the blocks with transformers, which most LoRAs are limited to.
    """

    names: tuple[str, ...]
    attention_names: tuple[str, ...]

    def get_block(self, name: str) -> str:
        """Return the block of a weight or layer, by our name; its prefix `unet.` is optional."""
        if match := NUMBERED_BLOCK.match(name):
            return _make_name(match[1], match[2])
        unet_name = name.removeprefix("unet.")
        if unet_name.startswith(FIRST_PREFIXES):
            return "IN00"
        if unet_name.startswith(LAST_PREFIX):
            return self.names[-1]
        return MIDDLE_BLOCK if unet_name.startswith(MIDDLE_PREFIX) else BASE_BLOCK

    def parse_weights(
        self, text: str, default: float, argument: str, *, is_lora: bool = False
    ) -> dict[str, float]:
        """Return the weight of each block.

        Args:
            text: Weights separated by commas: of all blocks, of all but BASE, or as `NAME=WEIGHT`.
            default: Weight of blocks without a weight in the text.
            argument: Name of the argument with the text, for errors.
            is_lora: Whether the weights may also be those of `attention_names`.
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
        allowed_names = [self.names, self.names[1:]]
        if is_lora:
            allowed_names.append(self.attention_names)
        for names in allowed_names:
            if len(numbers) == len(names):
                return dict.fromkeys(self.names, default) | dict(zip(names, numbers, strict=True))
        allowed = ", ".join(f"{len(n)} ({n[0]} … {n[-1]})" for n in allowed_names)
        message = f"{len(numbers)} block weights, this model takes {allowed}"
        raise ArgumentError(message, argument)


def list_blocks(names: Iterable[str]) -> Blocks:
    """List the blocks of a model by our names of its weights, or of its UNet's weights."""
    counts = {"input": 0, "output": 0}
    attention_names = {BASE_BLOCK}
    for name in names:
        if match := NUMBERED_BLOCK.match(name):
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
            if TRANSFORMER_LAYER in name:
                attention_names.add(_make_name(match[1], match[2]))
        elif name.removeprefix("unet.").startswith(MIDDLE_PREFIX) and TRANSFORMER_LAYER in name:
            attention_names.add(MIDDLE_BLOCK)
    inputs, outputs = ([_make_name(side, i) for i in range(counts[side])] for side in counts)
    block_names = (BASE_BLOCK, *inputs, MIDDLE_BLOCK, *outputs)
    return Blocks(block_names, tuple(name for name in block_names if name in attention_names))


def _make_name(side: str, number: str | int) -> str:
    """Return the name of an "input" or "output" block, such as IN04."""
    return f"{BLOCK_LABELS[side]}{int(number):02}"


def _parse_number(text: str, argument: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"the block weight `{text}` is not a number", argument)
    return value


def _abbreviate(names: Sequence[str]) -> str:
    """List names as text, with `IN00 … IN11` for names that differ only in their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rstrip("0123456789"), []).append(name)
    return ", ".join(g[0] if len(g) == 1 else f"{g[0]} … {g[-1]}" for g in groups.values())
