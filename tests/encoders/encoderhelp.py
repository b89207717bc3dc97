"""Helpers for the tests of encoders: configs of tiny towers, comparison, options of `prepare`."""

import torch

from goldfile import load_golden
from ldm.conditioning import PrepareOptions

PROMPTS = ["a cat", "an astronaut riding a horse, photograph"]
# Configs of tiny text towers, with the keys of transformers and of open_clip.
CLIP_ARCH = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
OPEN_CLIP_ARCH = {
    "embed_dim": 24, "text_cfg": {"vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}  # fmt: skip
# Options of encoders, by recorded output.
HIDDEN_LAYERS = {"hidden_m2": -2, "hidden_m1": -1, "hidden_0": 0, "hidden_1": 1}
CLIP_OUTPUTS = {name: {"layer": "hidden", "layer_idx": k} for name, k in HIDDEN_LAYERS.items()}
CLIP_OUTPUTS |= {"last": {}, "pooled": {"layer": "pooled"}}
OPEN_CLIP_OUTPUTS = {layer: {"layer": layer} for layer in ("penultimate", "last")}


def assert_close(actual, expected, tolerance=1e-5):
    """Compare values, relative to the largest; observed errors are below a third of the limit."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def encode_recorded_prompts(encoder, golden):
    """Load the recorded weights, and encode the prompts whose outputs are recorded."""
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    indices = golden.cases[0]["info"]["outputs_are_for_prompt_indices"]
    return encoder.encode([golden.meta["prompts"][k] for k in indices])


def assert_contexts_close(name, build, tolerance=1e-5):
    """Compare the contexts of the prompts of a golden file, for each recorded output."""
    golden = load_golden(name)
    config = golden.meta["config"]
    arch = config.get("tiny_arch") or config["tiny_hf_config"]
    outputs = OPEN_CLIP_OUTPUTS if "tiny_arch" in config else CLIP_OUTPUTS
    for output, options in outputs.items():
        context = encode_recorded_prompts(build(arch=arch, **options), golden)
        assert_close(context, golden.outputs("prompts")[output], tolerance)


def make_options(size=(8, 8), seed=None, encode=torch.neg):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return PrepareOptions(size, encode, generator)
