"""Helpers for the tests of encoders: configs of tiny towers, comparison, options of `prepare`."""

import torch

from ldm.conditioning import PrepareOptions

PROMPTS = ["a cat", "an astronaut riding a horse, photograph"]
# Configs of tiny text towers, with the keys of transformers and of open_clip.
CLIP_ARCH = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
OPEN_CLIP_ARCH = {
    "embed_dim": 24, "text_cfg": {"vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}  # fmt: skip
HIDDEN_LAYERS = {f"hidden_{name}": {"layer": "hidden", "layer_idx": k} for name, k in
                 [("m2", -2), ("m1", -1), ("0", 0), ("1", 1)]}  # fmt: skip


def assert_close(actual, expected, tolerance=1e-5):
    """Compare values, relative to the largest; observed errors are below a third of the limit."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def make_options(size=(8, 8), seed=None, encode=torch.neg):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return PrepareOptions(size, encode, generator)
