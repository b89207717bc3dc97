"""Clip skip: an earlier layer of the text tower, then the final norm."""

import pytest
import torch
from encoderhelp import CLIP_ARCH, OPEN_CLIP_ARCH, PROMPTS, assert_close, encode_recorded_prompts

from goldfile import load_golden
from ldm.encoders.text import CLIPText, OpenCLIPText, clip_skip

ARCH = CLIP_ARCH | {"num_hidden_layers": 4}


@pytest.mark.slow
def test_each_layer_is_that_of_transformers():
    """As in diffusers' `encode_prompt`, whose clip_skip is one less."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = CLIPText(arch=ARCH)
    config = transformers.CLIPTextConfig(**ARCH, hidden_act="quick_gelu", eos_token_id=49407)
    oracle = transformers.CLIPTextModel(config).eval()
    state = {f"text_model.{name}": value for name, value in encoder.tower.state_dict().items()}
    if not any(name.startswith("text_model.") for name in oracle.state_dict()):
        state = encoder.tower.state_dict()
    oracle.load_state_dict(state, strict=False)
    tower = getattr(oracle, "text_model", oracle)
    with torch.no_grad():
        outputs = oracle(encoder.tokenize(PROMPTS), output_hidden_states=True)
        for layers in range(1, 5):
            with clip_skip(layers):
                context = encoder.encode(PROMPTS)
            expected = tower.final_layer_norm(outputs.hidden_states[-layers])
            assert_close(context, expected, 2e-6)  # observed: 6e-7


def test_the_final_norm_is_applied_to_the_penultimate_layer():
    golden = load_golden("text_hfclip")
    encoder = CLIPText(arch=golden.meta["config"]["tiny_hf_config"])
    with clip_skip(2), torch.no_grad():
        context = encode_recorded_prompts(encoder, golden)
        expected = encoder.tower.final_layer_norm(golden.outputs("prompts")["hidden_m2"])
    assert_close(context, expected)


@pytest.mark.parametrize(
    ("build", "options", "has_effect"),
    [
        (CLIPText, {"arch": ARCH}, True),
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "layer": "last"}, True),
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "layer": "penultimate"}, False),
        (CLIPText, {"arch": ARCH, "layer": "hidden", "layer_idx": 3}, False),
    ],
)
def test_only_towers_that_end_with_their_last_layer_take_clip_skip(build, options, has_effect):
    encoder = build(**options)
    encoder.cache = {text: {"context": torch.zeros(77, 32)} for text in PROMPTS}
    cached = encoder.encode(PROMPTS)
    with clip_skip(2):
        context = encoder.encode(PROMPTS)
    assert torch.equal(cached, context) != has_effect
    assert encoder.takes_clip_skip == has_effect
