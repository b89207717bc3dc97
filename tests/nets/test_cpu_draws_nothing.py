"""Trying out kernels must not move the generator that `--legacy noise` draws from."""

import torch

from ldm.nets import cpu


def test_trying_kernels_draws_nothing():
    cpu._dtypes.cache_clear()
    before = torch.get_rng_state()
    cpu._dtypes()
    assert torch.equal(torch.get_rng_state(), before)
