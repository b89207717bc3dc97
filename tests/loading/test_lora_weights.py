"""Weights of LoRAs by text encoder, block and rank, and `set_loras`."""

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.loading.addons.lora import load_loras, read_weight_changes
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_weights import LoRAWeight, split_weight
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.nets.lora import LoRA
from loading.lorahelp import (
    are_equal,
    build_diffusers_pipeline,
    build_tiny_model,
    collect_weights,
    compute_diffusers_outputs,
    compute_outputs,
    make_random_lora,
    read_lora,
)
from quick import slow_except

BLOCKS = "lbw=IN01=0.5,M00=0,OUT02=2"


@pytest.fixture
def path(tmp_path):
    model = build_tiny_model()
    write_lora(make_random_lora(model, alpha=2), tmp_path / "x.safetensors", model)
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("text", "weight", "written"),
    [
        ("0.8", LoRAWeight(0.8, 0.8), 0.8),
        ("-0.5:1e-1", LoRAWeight(-0.5, 0.1), "-0.5:0.1"),
        ("0.5:1:8", LoRAWeight(0.5, 1, 8), "0.5:1:dyn=8"),
        ("te=0.5:unet=1:dyn=8", LoRAWeight(0.5, 1, 8), "0.5:1:dyn=8"),
        ("te=0.5", LoRAWeight(0.5, 0.5), 0.5),
        ("unet=0", LoRAWeight(1, 0), "1:0"),
        ("1:1:lbw=1,0,0", LoRAWeight(1, 1, None, "1,0,0"), "1:lbw=1,0,0"),
        ("0.7:IN04=1,M00=0", LoRAWeight(0.7, 0.7, None, "IN04=1,M00=0"), "0.7:lbw=IN04=1,M00=0"),
    ],
)
def test_weights_are_parsed_in_every_form(text, weight, written):
    assert LoRAWeight.parse(text) == weight
    assert weight.to_json() == written
    assert LoRAWeight.parse(written) == weight


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("much", "`much` is not a number"),
        ("1e400", "`1e400` is not a number"),
        ("1:2:3:4", "is not the weight of a LoRA, such as"),
        ("foo=1", "is not the weight of a LoRA, such as"),
        ("te=1:te=2", "is not the weight of a LoRA, such as"),
        ("dyn=0", "dyn `0` is not a positive whole number"),
        (float("nan"), "the weight of a LoRA must be a finite number, got nan"),
        (None, "the weight of a LoRA must be a finite number, got None"),
    ],
)
def test_an_invalid_weight_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        LoRAWeight.parse(text)


def test_a_file_name_may_contain_a_colon():
    assert split_weight(r"C:\a.safetensors:0.5:lbw=1,0") == (r"C:\a.safetensors", "0.5:lbw=1,0")
    assert split_weight("a:b.safetensors") == ("a:b.safetensors", "")


def test_the_text_encoder_and_each_block_get_their_own_weights(path):
    model = build_tiny_model()
    base, lora = collect_weights(model), read_lora(path, model)
    layers = {id(layer.target.layer): layer for layer in lora.layers.values()
              if layer.target.qkv_index is None}  # fmt: skip
    load_loras(model, [(path, f"0.25:2:{BLOCKS}")])
    applied = set()
    for name, module in model.named_modules():
        if id(module) not in layers:
            continue
        block = ".".join(name.split(".")[:3])
        weight = {"unet.input_blocks.1": 1.0, "unet.middle_block.0": 0.0,
                  "unet.middle_block.1": 0.0, "unet.middle_block.2": 0.0,
                  "unet.output_blocks.2": 4.0}.get(block, 2.0)  # fmt: skip
        weight = weight if name.startswith("unet.") else 0.25
        expected = base[f"{name}.weight"] + weight * layers[id(module)].compute_delta()
        torch.testing.assert_close(module.weight, expected, rtol=0, atol=1e-6)
        applied.add(weight)
    assert applied == {0.25, 0, 1, 2, 4}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_diffusers_computes_the_same_with_a_weight_for_each_block(tmp_path):
    pytest.importorskip("peft")
    model, path = build_tiny_model(), tmp_path / "x.safetensors"
    layers = {name: layer for name, layer in make_random_lora(model).layers.items()
              if "_attentions_" in name or name.startswith("lora_te_")}  # fmt: skip
    write_lora(LoRA(layers), path, model)
    pipeline = build_diffusers_pipeline(model)
    pipeline.load_lora_weights(str(path))
    scales = {"text_encoder": 0.25, "unet": {"down": 0.5, "mid": 2.0, "up": -1.0}}
    pipeline.set_adapters(pipeline.get_active_adapters(), [scales])
    blocks = [*(f"IN0{k}=0.5" for k in range(1, 4)), "M00=2", *(f"OUT0{k}=-1" for k in range(4))]
    ldm.set_loras(model, [(path, f"0.25:1:{','.join(blocks)}")])
    ours, theirs = compute_outputs(model), compute_diffusers_outputs(pipeline, model)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


def test_the_rank_of_plain_loras_can_be_truncated(path, tmp_path):
    model, name = build_tiny_model(), "lora_unet_conv_in"
    layer = read_lora(path, model)[name]
    up, down = layer.lora_up.weight[:, :1].flatten(1), layer.lora_down.weight[:1].flatten(1)
    delta = (up @ down).view_as(layer.target.weight) * layer.alpha / layer.rank
    changes = dict(read_weight_changes(path, model, "1:dyn=1"))
    torch.testing.assert_close(changes[name].compute_delta(), delta, rtol=0, atol=1e-6)
    save_file({f"{name}.diff": torch.zeros_like(delta)}, tmp_path / "diff.safetensors")
    with pytest.raises(ValueError, match="is not a plain LoRA: its rank cannot be truncated"):
        load_loras(model, [(tmp_path / "diff.safetensors", "1:dyn=1")])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("1,0", "2 block weights, this model takes"),
        ("IN99=1", "no block IN99"),
        ("IN01=x,M00=1", "`x` is not a number"),
    ],
)
def test_invalid_block_weights_are_refused_in_one_line(path, blocks, message):
    with pytest.raises(ValueError, match=message) as error:
        load_loras(build_tiny_model(), [(path, f"1:lbw={blocks}")])
    assert "\n" not in str(error.value)


def test_set_loras_gives_the_same_weights_as_loading_with_them(path, tmp_path):
    other = tmp_path / "y.safetensors"
    write_lora(make_random_lora(build_tiny_model(), seed=3), other, build_tiny_model())
    model = build_tiny_model()
    vectors = torch.ones(1, model.conditioner.text.width)
    state = read_checkpoint(other).state_dict | {"bundle_emb.cat.string_to_param.*": vectors}
    save_file({name: value.contiguous() for name, value in state.items()}, other)
    base, loras = collect_weights(model), [(path, 0.3), (other, "0.5:1")]
    parameters = dict(model.named_parameters())
    for each in ([(path, 1.0)], loras, [(other, 0.0)], loras):
        ldm.set_loras(model, each)
    fresh = build_tiny_model()
    load_loras(fresh, loras)
    assert are_equal(collect_weights(model), collect_weights(fresh))
    assert model.provenance["loras"] == fresh.provenance["loras"]
    assert [*model.conditioner.text.added_embeddings] == ["cat"]
    with pytest.raises(FileNotFoundError):
        ldm.set_loras(model, [(tmp_path / "none.safetensors", 1.0)])
    assert are_equal(collect_weights(model), collect_weights(fresh))
    ldm.set_loras(model, [])
    assert are_equal(collect_weights(model), base)
    assert dict(model.named_parameters()) == parameters  # the same memory
    assert (model.provenance["loras"], model.conditioner.text.added_embeddings) == ([], {})
    with pytest.raises(ValueError, match="was loaded with loras, which cannot be removed"):
        ldm.set_loras(fresh, [])


def test_a_sum_too_large_for_the_weights_leaves_none_of_the_loras(path):
    model = build_tiny_model().half()
    base = collect_weights(model)
    ldm.set_loras(model, [(path, 1.0)])
    with pytest.raises(ValueError, match="too large for torch.float16"):
        ldm.set_loras(model, [(path, 1e9)])
    assert are_equal(collect_weights(model), base)
    assert model.provenance["loras"] == []


LAYER = "lora_unet_mid_block_resnets_0_conv1"
ROTATIONS = {  # tensors for a weight (64, 64, 3, 3)
    "DoRA": {"diff": (64, 64, 3, 3), "dora_scale": (64, 1, 1, 1)},
    "OFT": {"oft_blocks": (8, 8, 8)},
    "BOFT": {"oft_blocks": (2, 8, 8, 8)},
    "(IA)^3": {"weight": (1, 64, 1, 1), "on_input": ()},
}


def write_rotation(path, rotation, seed=0):
    torch.manual_seed(seed)
    sizes = {f"{LAYER}.{role}": size for role, size in ROTATIONS[rotation].items()}
    save_file({name: torch.rand(size) + 0.1 for name, size in sizes.items()}, path)
    return path


@pytest.mark.parametrize("rotation", slow_except(ROTATIONS, "DoRA", "BOFT"))
def test_the_weight_of_a_rotation_is_changed_and_removed_bit_by_bit(rotation, tmp_path):
    path, model = write_rotation(tmp_path / "x.safetensors", rotation), build_tiny_model()
    base, equals_base = collect_weights(model), []
    for weight in (1.0, 0.3, 0.0, -0.5):
        ldm.set_loras(model, [(path, weight)])
        fresh = build_tiny_model()
        load_loras(fresh, [(path, weight)])
        assert are_equal(collect_weights(model), collect_weights(fresh))
        equals_base.append(are_equal(collect_weights(model), base))
    assert equals_base == [False, False, True, False]
    ldm.set_loras(model, [])
    assert are_equal(collect_weights(model), base)


ROTATION_PAIRS = [("DoRA", "OFT"), ("OFT", "BOFT"), ("BOFT", "DoRA")]


@pytest.mark.parametrize("rotations", slow_except(ROTATION_PAIRS, ROTATION_PAIRS[0]))
def test_two_files_that_rotate_a_weight_are_applied_in_order_with_a_warning(
    rotations, path, tmp_path, caplog
):
    """LoRAs that add to the weight come first."""
    paths = [
        write_rotation(tmp_path / f"{n}.safetensors", rotation, n)
        for n, rotation in enumerate(rotations)
    ]
    results = []
    for first, second in (paths, paths[::-1]):
        caplog.clear()
        model = build_tiny_model()
        load_loras(model, [(first, 1.0), (path, 0.5), (second, 0.7)])
        names = f"`{first.name}`, `{second.name}`"
        message = f"{names} scale or rotate the same weights: they are applied"
        assert [r.getMessage().startswith(message) for r in caplog.records] == [True]
        expected = build_tiny_model()
        for lora in [(path, 0.5), (first, 1.0), (second, 0.7)]:
            load_loras(expected, [lora])
        results.append(collect_weights(model))
        for name, value in collect_weights(expected).items():
            torch.testing.assert_close(results[-1][name], value, rtol=0, atol=1e-5)
    name = "unet.middle_block.0.in_layers.2.weight"
    assert (results[0][name] - results[1][name]).abs().max() > 0.01


def test_set_loras_works_after_the_model_was_cast(path):
    model = build_tiny_model()
    ldm.set_loras(model, [(path, 1.0)])
    model.half()
    ldm.set_loras(model, [])
    assert are_equal(collect_weights(model), collect_weights(build_tiny_model().half()))
