"""Helpers for the tests of encoders: comparison, and options of `prepare`."""

import torch

from ldm.conditioning import PrepareOptions


def assert_close(ours, theirs, tolerance=1e-5):
    """Compare values, relative to the largest; observed errors are below a third of the limit."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


def make_options(size=(8, 8), seed=None, encode=torch.neg):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return PrepareOptions(size, encode, generator)
