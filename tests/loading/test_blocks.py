"""Blocks of UNets, and block weights."""

import pytest

from ldm.loading.blocks import list_blocks
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.families import CONFIG_DIR, SDXL_CONFIG_DIR
from ldm.runtime.errors import ArgumentError

ATTENTION = "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10"
SDXL_ATTENTION = "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"


def list_blocks_of(config):
    return list_blocks(build_on_meta(read_yaml(f"{config}.yaml")).state_dict())


@pytest.fixture(scope="module")
def blocks():
    return list_blocks_of(f"{CONFIG_DIR}/v1-inference")


def test_stable_diffusion_has_twelve_input_and_output_blocks(blocks):
    numbers = [f"{number:02}" for number in range(12)]
    names = ["BASE", *(f"IN{n}" for n in numbers), "M00", *(f"OUT{n}" for n in numbers)]
    assert list(blocks.names) == names
    assert list(blocks.attention_names) == [*ATTENTION.split(), "OUT11"]


def test_sdxl_has_nine_input_and_output_blocks():
    blocks = list_blocks_of(f"{SDXL_CONFIG_DIR}/sd_xl_base")
    assert len(blocks.names) == 20
    assert list(blocks.attention_names) == SDXL_ATTENTION.split()
    assert blocks.get_block("unet.out.2.weight") == "OUT08"
    assert blocks.get_block("unet.label_emb.0.0.weight") == "IN00"


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.time_embed.0.weight", "IN00"),
        ("unet.input_blocks.0.0.weight", "IN00"),
        ("input_blocks.11.0.in_layers.2", "IN11"),
        ("middle_block.1.norm", "M00"),
        ("unet.output_blocks.3.1.proj_in.weight", "OUT03"),
        ("unet.out.0.weight", "OUT11"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "BASE"),
        ("conditioner.text.transformer.text_model.final_layer_norm.weight", "BASE"),
        ("autoencoder.encoder.conv_in.weight", "BASE"),
    ],
)
def test_get_block_finds_the_block_of_a_weight(blocks, name, block):
    assert blocks.get_block(name) == block


def test_numbers_are_in_the_order_of_the_blocks(blocks):
    numbers = [number / 100 for number in range(26)]
    text = ",".join(map(str, numbers))
    assert list(blocks.parse_weights(text, 0.5, "x").values()) == numbers
    without_base = blocks.parse_weights(text.removeprefix("0.0,"), 0.5, "x")
    assert list(without_base.values()) == [0.5, *numbers[1:]]


def test_seventeen_numbers_are_for_the_blocks_that_a_plain_lora_changes(blocks):
    weights = blocks.parse_weights(",".join("2" * 17), 0.5, "x", is_lora=True)
    assert {block for block, weight in weights.items() if weight == 2} == {*blocks.attention_names}
    assert {*weights.values()} == {2, 0.5}


def test_blocks_that_are_not_named_have_the_default_weight(blocks):
    weights = blocks.parse_weights("in04=0, OUT11 = 1", 0.5, "x")
    assert (weights["IN04"], weights["OUT11"], weights["BASE"], weights["M00"]) == (0, 1, 0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", r"3 block weights, this model takes 26 \(BASE … OUT11\), 25 \(IN00 … OUT11\)$"),
        (",".join("1" * 17), "17 block weights"),
        ("IN12=1", "no block IN12, it has BASE, IN00 … IN11, M00, OUT00 … OUT11"),
        ("IN00=much", "`much` is not a number"),
        ("nan", "`nan` is not a number"),
        ("IN00=1,in00=0.5", "block IN00 has two weights"),
    ],
)
def test_block_weights_that_do_not_fit_the_model_are_refused(blocks, text, message):
    with pytest.raises(ArgumentError, match=message):
        blocks.parse_weights(text, 0.5, "x")
