"""Files and configs of latent-diffusion, before Stable Diffusion."""

from pathlib import Path

import pytest
import torch

import ldm
from goldfile import load_golden
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.families import FAMILIES, detect_family
from ldm.loading.legacy import translate_config
from ldm.loading.weight_names import pair_names, rename_weights, restore_names
from nets.nethelp import describe_tensors, read_original_tensors

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs/latent-diffusion").glob("*.yaml"))
SLOTS = {
    "celebahq-ldm-vq-4": {},
    "lsun_churches-ldm-kl-8": {},
    "cin-ldm-vq-f8": {"class_label": "crossattn"},
    "cin256-v2": {"class_label": "crossattn"},
    "text2img256": {"txt": "crossattn"},
    "txt2img-1p4B-eval": {"txt": "crossattn"},
    "layout2img-openimages256": {"coordinates_bbox": "crossattn"},
    "semantic_synthesis256": {"segmentation": "concat"},
    "semantic_synthesis512": {"segmentation": "concat"},
    "bsr_sr": {"lr": "concat"},
    "inpainting_big": {"masked": "concat"},
    "rdm768x768": {"context": None},  # depends on the dimensions of the input
}
# Its weights are those of the model for 256 x 256.
PUBLISHED = [name for name in CONFIGS if name != "semantic_synthesis512"]


def read_config(name):
    return read_yaml(f"configs/latent-diffusion/{name}.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_names_and_shapes_of_published_files(name):
    model = build_on_meta(read_config(name))
    state = restore_names(model.state_dict(), model.schedule.compute_buffers())
    recorded = read_original_tensors(name)
    recorded.pop("scale_factor", None)  # measured in training
    assert describe_tensors(state) == recorded


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_recognized(name):
    tensors = read_original_tensors(name)
    state = {key: torch.zeros(()).expand(shape) for key, (shape, _) in tensors.items()}
    (family,) = (family for family in FAMILIES if family.config == name)
    assert detect_family(rename_weights(state)) is family


@pytest.mark.parametrize("name", CONFIGS)
def test_encoders_of_a_config_have_the_keys_and_slots_of_its_family(name):
    spec = translate_config(read_config(name))["params"]["conditioner"]
    encoders = build_on_meta(spec).children()
    slots = {encoder.key: getattr(encoder, "slot", None) for encoder in encoders}
    assert slots == SLOTS[name]


def test_an_unconditional_model_has_no_condition_whatever_its_conditioning_key():
    config = read_config("celebahq-ldm-vq-4")
    config["model"]["params"]["conditioning_key"] = "concat"
    assert not build_on_meta(translate_config(config)["params"]["conditioner"]).encoders


def test_defaults_are_those_of_the_scripts():
    defaults = {name: build_on_meta(read_config(name)).defaults for name in SLOTS}
    assert defaults["txt2img-1p4B-eval"].scale == 5
    assert defaults["txt2img-1p4B-eval"].steps == 200
    assert defaults["cin256-v2"].scale == 3
    assert defaults["celebahq-ldm-vq-4"].eta == defaults["bsr_sr"].eta == 1
    unguided = SLOTS.keys() - {"txt2img-1p4B-eval", "text2img256", "cin256-v2", "rdm768x768"}
    assert {defaults[name].scale for name in unguided} == {1}


def test_only_models_with_1001_classes_have_an_unconditional_class():
    embedders = {name: build_on_meta(read_config(name)).conditioner.text for name in SLOTS}
    assert embedders["cin256-v2"].null == 1000
    assert embedders["cin-ldm-vq-f8"].null is None


def test_the_second_copy_of_the_autoencoder_and_unused_tensors_are_left_out():
    names = [
        "first_stage_model.encoder.conv_in.weight", "cond_stage_model.encoder.conv_in.weight",
        "cond_stage_model.quantize.embedding.weight", "cond_stage_model.loss.discriminator.x",
        "first_stage_model.quantize.used", "first_stage_model.colorize",
    ]  # fmt: skip
    assert list(pair_names(names)) == [("autoencoder.encoder.conv_in.weight", names[0])]
    bert = [f"cond_stage_model.transformer.{name}" for name in ("norm.weight", "to_logits.bias")]
    assert list(pair_names(bert)) == [("conditioner.text.transformer.norm.weight", bert[0])]


@pytest.mark.parametrize("file_name", ["model.ckpt", "last.ckpt"])
def test_the_folder_of_a_published_model_is_loaded(tmp_path, file_name):
    golden = load_golden("ldm_class")
    model = ldm.instantiate(golden.meta["config"])
    weights = golden.weights(restore_names(model.state_dict()))
    torch.save({"state_dict": weights, "global_step": 5}, tmp_path / file_name)
    config = {"model": golden.meta["config"]}
    (tmp_path / "config.yaml").write_text(str(config).replace("'", '"'))
    loaded = ldm.load(tmp_path)
    expected = rename_weights(weights)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())
    assert ldm.class2img(loaded, [2], steps=1).shape == (1, 3, 32, 32)
