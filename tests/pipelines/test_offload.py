"""Offloading: one part of the model at a time is on the device; the memory that this takes."""

from functools import partial

import pytest
import torch

import ldm
from goldfile import load_golden
from imagehelp import write_random_lora
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.model import LatentDiffusion
from ldm.pipelines import inpaint, txt2img
from ldm.pipelines.memory import estimate_memory
from pipelines.goldmodels import build_recorded_model

QUICK = {"steps": 2, "scale": 3.0, "seeds": 5}
CPU = torch.device("cpu")
XL = "configs/stable-diffusion-xl"


def build_text_model() -> LatentDiffusion:
    return build_recorded_model(load_golden("e2e_txt2img"), "base_v")


def get_addresses(model: LatentDiffusion) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def list_parts_on_device(model: LatentDiffusion, home: dict[str, int]) -> set[str]:
    """List the networks whose weights are not at their original addresses."""
    return {n.split(".")[0] for n, pointer in get_addresses(model).items() if pointer != home[n]}


def test_one_part_at_a_time_has_a_copy_on_the_device():
    """Here the device is the CPU as well: a copy has another address."""
    model = build_text_model()
    expected = txt2img(model, ["a"], **QUICK)
    model.offload(CPU)
    home, parts = get_addresses(model), []

    def check(layer, inputs, *, name):
        own = [f"{name}.{key}" for key, _ in layer.named_parameters(recurse=False)]
        assert all(
            layer.get_parameter(key.rsplit(".", 1)[1]).data_ptr() != home[key] for key in own
        )
        if own:
            parts.append(list_parts_on_device(model, home))

    for name, layer in model.named_modules():
        layer.register_forward_pre_hook(partial(check, name=name))
    assert torch.equal(txt2img(model, ["a"], **QUICK), expected)
    assert all(len(part) == 1 for part in parts)
    assert set.union(*parts) == {"conditioner", "unet", "autoencoder"}


@pytest.mark.slow
def test_loras_are_exchanged_while_a_part_is_on_the_device(tmp_path):
    model, offloaded = build_text_model(), build_text_model()
    file = write_random_lora(tmp_path / "x.safetensors", model, 0)
    offloaded.offload(CPU)
    images = {}
    for weight in (0.5, 0.8, 0.5):
        for one in (model, offloaded):
            ldm.set_loras(one, [(file, weight)])
        images[weight], expected = (
            txt2img(one, ["a"], **QUICK | {"steps": 1}) for one in (offloaded, model)
        )
        assert torch.equal(images[weight], expected)
    assert not torch.equal(images[0.5], images[0.8])


def test_a_model_leaves_the_device_for_another():
    first, second = build_text_model(), build_text_model()
    home = get_addresses(first)
    for model in (first, second):
        model.offload(CPU)
        txt2img(model, ["a"], **QUICK)
    assert list_parts_on_device(first, home) == set()


def test_encoders_of_images_stay_on_the_device():
    model = build_recorded_model(load_golden("e2e_inpaint"), "inpaint")
    image, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    expected = inpaint(model, ["a"], image, mask, **QUICK)
    model.offload(CPU)
    assert torch.equal(inpaint(model, ["a"], image, mask, **QUICK), expected)


def test_a_cast_survives_the_end_of_the_copy():
    """Such as to float32 after NaN in half precision."""
    model, other = build_text_model().bfloat16(), build_text_model().bfloat16().float()
    expected = txt2img(other, ["a"], **QUICK)
    model.offload(CPU)
    txt2img(model, ["a"], **QUICK)
    model.float()
    assert torch.equal(txt2img(model, ["a"], **QUICK), expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.gpu
def test_images_of_an_offloaded_model_on_a_gpu_are_the_same():
    expected = ldm.txt2img(ldm.load(device="cuda"), ["a red apple"], **QUICK)
    model = ldm.load(device="cuda", offload=True)
    assert torch.equal(ldm.txt2img(model, ["a red apple"], **QUICK), expected)
    assert {p.device.type for p in model.unet.parameters()} == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "refiner"])
def test_sdxl_at_1024_pixels_fits_8_gb_when_offloaded(name):
    """5.1 and 4.6 GiB, in float16 with the autoencoder in float32; whole: 9.6 and 8.8."""
    config = f"{XL}/sd_xl_{name}.yaml"
    model = build_on_meta(read_yaml(config), where=config).half()
    model.autoencoder.float()
    memory = estimate_memory(model, (1024, 1024))
    assert memory.without_offload == sum(memory.weights.values()) + max(memory.activations.values())
    own = 0.5 * 2**30  # of PyTorch and the driver
    assert memory.with_offload + own < 8e9 < memory.without_offload
