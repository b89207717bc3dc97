"""Offloading: one component of the model at a time is on the device; memory estimates."""

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


def get_data_ptrs(model: LatentDiffusion) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def list_copied_components(model: LatentDiffusion, original_ptrs: dict[str, int]) -> set[str]:
    """List the components whose weights have left their original memory."""
    ptrs = get_data_ptrs(model)
    return {name.split(".")[0] for name, ptr in ptrs.items() if ptr != original_ptrs[name]}


def test_one_component_at_a_time_is_copied_to_the_device():
    """The device is the CPU here: a copy has other memory."""
    model = build_text_model()
    expected = txt2img(model, ["a"], **QUICK)
    model.offload(CPU)
    original_ptrs, copied = get_data_ptrs(model), []

    def check(layer, inputs, *, name):
        parameters = dict(layer.named_parameters(recurse=False))
        assert all(p.data_ptr() != original_ptrs[f"{name}.{k}"] for k, p in parameters.items())
        if parameters:
            copied.append(list_copied_components(model, original_ptrs))

    for name, layer in model.named_modules():
        layer.register_forward_pre_hook(partial(check, name=name))
    assert torch.equal(txt2img(model, ["a"], **QUICK), expected)
    assert all(len(components) == 1 for components in copied)
    assert set.union(*copied) == {"conditioner", "unet", "autoencoder"}


@pytest.mark.slow
def test_loras_are_replaced_while_a_component_is_on_the_device(tmp_path):
    model, offloaded = build_text_model(), build_text_model()
    path = write_random_lora(tmp_path / "x.safetensors", model, 0)
    offloaded.offload(CPU)
    images = {}
    for weight in (0.5, 0.8, 0.5):
        for each in (model, offloaded):
            ldm.set_loras(each, [(path, weight)])
        images[weight], expected = (
            txt2img(each, ["a"], **QUICK | {"steps": 1}) for each in (offloaded, model)
        )
        assert torch.equal(images[weight], expected)
    assert not torch.equal(images[0.5], images[0.8])


def test_a_model_leaves_the_device_when_another_is_used():
    first, second = build_text_model(), build_text_model()
    original_ptrs = get_data_ptrs(first)
    for model in (first, second):
        model.offload(CPU)
        txt2img(model, ["a"], **QUICK)
    assert list_copied_components(first, original_ptrs) == set()


def test_offloading_does_not_change_inpainting():
    model = build_recorded_model(load_golden("e2e_inpaint"), "inpaint")
    image, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    expected = inpaint(model, ["a"], image, mask, **QUICK)
    model.offload(CPU)
    assert torch.equal(inpaint(model, ["a"], image, mask, **QUICK), expected)


def test_a_model_that_is_cast_on_the_device_stays_cast():
    """Such as to float32 after NaN in half precision."""
    model, float32_model = build_text_model().bfloat16(), build_text_model().bfloat16().float()
    expected = txt2img(float32_model, ["a"], **QUICK)
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
    """float16 with a float32 autoencoder: 5.1 and 4.6 GiB, without offloading 9.6 and 8.8."""
    config = f"{XL}/sd_xl_{name}.yaml"
    model = build_on_meta(read_yaml(config), where=config).half()
    model.autoencoder.float()
    memory = estimate_memory(model, (1024, 1024))
    assert memory.without_offload == sum(memory.weights.values()) + max(memory.activations.values())
    overhead = 0.5 * 2**30  # of PyTorch and the driver
    assert memory.with_offload + overhead < 8e9 < memory.without_offload
