"""Clip skip: an earlier layer of the text tower, then the final norm."""

import pytest
import torch
from encoderhelp import assert_close

from goldfile import gold
from ldm.encoders.text import CLIPText, OpenCLIPText, clip_skip

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
OPEN = {"embed_dim": 24, "text_cfg": {"width": 32, "heads": 4, "layers": 4}}
PROMPTS = ["a cat", "an astronaut riding a horse, photograph"]


def test_the_last_layer_but_one_gets_the_final_norm():
    golden = gold("text_hfclip")
    encoder = CLIPText(arch=golden.meta["config"]["tiny_hf_config"])
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    indices = golden.cases[0]["info"]["outputs_are_for_prompt_indices"]
    with clip_skip(2), torch.no_grad():
        context = encoder.encode([golden.meta["prompts"][k] for k in indices])
        expected = encoder.tower.final_layer_norm(golden.outputs("prompts")["hidden_m2"])
    assert_close(context, expected)


@pytest.mark.parametrize(
    ("build", "options", "is_taken"),
    [
        (CLIPText, {"arch": SIZES}, True),
        (OpenCLIPText, {"arch": OPEN, "layer": "last"}, True),
        (OpenCLIPText, {"arch": OPEN, "layer": "penultimate"}, False),
        (CLIPText, {"arch": SIZES, "layer": "hidden", "layer_idx": 3}, False),
    ],
)
def test_only_towers_that_end_with_their_last_layer_take_it(build, options, is_taken):
    encoder = build(**options)
    encoder.cache = {text: {"context": torch.zeros(77, 32)} for text in PROMPTS}
    cached = encoder.encode(PROMPTS)
    with clip_skip(2):
        context = encoder.encode(PROMPTS)
    assert torch.equal(cached, context) != is_taken
    assert encoder.takes_clip_skip == is_taken
