"""Shared by the tests of encoders: comparison, options of `prepare`."""

import torch

from ldm.conditioning import PrepareOptions


def assert_close(ours, theirs, tolerance=1e-5):
    """Compares values to a fraction of the greatest; observed errors are below a third of it."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


def options(size=(8, 8), seed=None, encode=torch.neg):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return PrepareOptions(size, encode, generator)
