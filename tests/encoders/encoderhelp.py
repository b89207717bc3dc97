"""Shared by the tests of encoders: comparison, lists of published keys, options of `prepare`."""

import re
from collections import Counter
from pathlib import Path

import torch

from ldm.conditioning import PrepareOptions

KEYS = Path(__file__).parents[1] / "data" / "keys"


def assert_close(ours, theirs, tolerance=1e-5):
    """Compares values to a fraction of the greatest; observed errors are below a third of it."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


def assert_published(keys, state):
    """Compares names and shapes, counted over the blocks, with the list of a published file."""
    names = Counter()
    for key, value in state.items():
        name = re.sub(r"\.(resblocks|layers|blocks)\.\d+\.", r".\1.*.", key)
        names[f"{name} {'x'.join(map(str, value.shape))}".rstrip()] += 1
    lines = (KEYS / f"{keys}.txt").read_text().splitlines()
    assert names == {name: int(n) for n, name in (line.split(" ", 1) for line in lines)}


def options(size=(8, 8), seed=None, encode=torch.neg):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return PrepareOptions(size, encode, generator)
