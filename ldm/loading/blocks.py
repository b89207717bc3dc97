"""Blocks of a UNet by the names that merges and LoRAs give them, and numbers for each.

    BASE    text encoders and autoencoder
    IN00    input_blocks.0, with the embeddings of time and size;  IN01 …  the further ones
    M00     middle_block
    OUT00   output_blocks.0 …;  the last one has `out`, too

SD 1 and 2 have 26 of them, SDXL 20.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ldm.runtime.errors import ArgumentError

__all__ = ["BASE", "Blocks", "find_blocks"]

BASE, MIDDLE = "BASE", "M00"
NUMBERED = re.compile(r"(?:unet\.)?(input|output)_blocks\.(\d+)\.")
LABELS = {"input": "IN", "output": "OUT"}
# Parts outside the numbered blocks, by the start of their names.
FIRST, CENTER, LAST = ("time_embed", "label_emb"), ("middle_block.",), ("out.",)
ATTENTION = ".transformer_blocks."


@dataclass(frozen=True)
class Blocks:
    """The blocks of one UNet."""

    names: tuple[str, ...]  # all, in the order BASE, IN00 …, M00, OUT00 …
    attention: tuple[str, ...]  # BASE and those with transformers, which a plain LoRA changes

    def block_of(self, name: str) -> str:
        """Return the block of a weight or layer, by our name, in the UNet also without `unet.`."""
        if match := NUMBERED.match(name):
            return f"{LABELS[match[1]]}{int(match[2]):02}"
        inner = name.removeprefix("unet.")
        if inner.startswith(FIRST):
            return "IN00"
        if inner.startswith(LAST):
            return self.names[-1]
        return MIDDLE if inner.startswith(CENTER) else BASE

    def parse(
        self, text: str, base: float, argument: str, *, adapter: bool = False
    ) -> dict[str, float]:
        """Read the number of each block: all of them, all but BASE, or `NAME=NUMBER` pairs.

        Args:
            text: separated by commas.
            base: number of the blocks that the text does not name.
            argument: that the text was given as, for errors.
            adapter: accept a number for each of `attention`, too.

        Raises:
            ArgumentError: there are too many or too few, an unknown name, or not a number.
        """
        entries = [entry.strip() for entry in text.split(",")]
        if all("=" in entry for entry in entries):
            pairs = [tuple(part.strip() for part in entry.split("=", 1)) for entry in entries]
            weights = {name.upper(): _number(value, argument) for name, value in pairs}
            return {**dict.fromkeys(self.names, base), **self._check_names(weights, argument)}
        numbers = [_number(entry, argument) for entry in entries]
        choices = [self.names, self.names[1:], *([self.attention] if adapter else [])]
        for names in choices:
            if len(numbers) == len(names):
                return dict.fromkeys(self.names, base) | dict(zip(names, numbers, strict=True))
        allowed = ", ".join(f"{len(names)} ({names[0]} … {names[-1]})" for names in choices)
        message = f"{len(numbers)} block weights, this model takes {allowed}"
        raise ArgumentError(message, argument)

    def _check_names(self, weights: Mapping[str, float], argument: str) -> Mapping[str, float]:
        for name in weights:
            if name not in self.names:
                message = f"the model has no block {name}, it has {_abbreviate(self.names)}"
                raise ArgumentError(message, argument)
        return weights


def find_blocks(names: Iterable[str]) -> Blocks:
    """Find the blocks of a model, by the names of its weights or layers, as `block_of` takes."""
    counts = {"input": 0, "output": 0}
    with_attention = {BASE}
    for name in names:
        if match := NUMBERED.match(name):
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
            if ATTENTION in name:
                with_attention.add(f"{LABELS[match[1]]}{int(match[2]):02}")
        elif name.removeprefix("unet.").startswith(CENTER) and ATTENTION in name:
            with_attention.add(MIDDLE)
    numbered = {
        kind: [f"{LABELS[kind]}{number:02}" for number in range(count)]
        for kind, count in counts.items()
    }
    blocks = (BASE, *numbered["input"], MIDDLE, *numbered["output"])
    return Blocks(blocks, tuple(block for block in blocks if block in with_attention))


def _number(text: str, argument: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"the block weight `{text}` is not a number", argument)
    return value


def _abbreviate(names: Sequence[str]) -> str:
    """Return IN00 … IN11 for all that begin alike."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rstrip("0123456789"), []).append(name)
    return ", ".join(g[0] if len(g) == 1 else f"{g[0]} … {g[-1]}" for g in groups.values())
