"""Files of SDXL that a command cannot use are refused by their headers or configs."""

import pytest
import torch

from ldm.loading.convert import convert, plan_conversion
from ldm.loading.files.checkpoint import write_checkpoint
from loading import tinyfamilies

UNET_PREFIX = "model.diffusion_model."
# By model: input channels, width of the context and of the vector, transformer blocks.
UNET_SIZES = {
    "sd1": (4, 768, None, 16),
    "base": (4, 2048, 2816, 70),
    "inpainting": (9, 2048, 2816, 70),
    "refiner": (4, 1280, 2560, 44),
}


@pytest.fixture
def files(tmp_path):
    """Files with only the weights by which families are recognized."""
    paths = {}
    for name, (channels, context, vector, blocks) in UNET_SIZES.items():
        state = {f"{UNET_PREFIX}input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}
        if vector:
            state[f"{UNET_PREFIX}label_emb.0.0.weight"] = torch.zeros(1, vector)
        for block in range(blocks):
            key = f"{UNET_PREFIX}input_blocks.4.1.transformer_blocks.{block}.attn2.to_k.weight"
            state[key] = torch.zeros(1, context)
        paths[name] = tmp_path / f"{name}.safetensors"
        write_checkpoint(paths[name], state)
    return paths


@pytest.mark.parametrize(
    ("command", "base", "refiner", "wrong", "message"),
    [
        ("txt2img", "refiner", None, "refiner", "is the refiner of Stable Diffusion XL: use"
         " `img2img`, or pass it as `refiner` with a base model"),
        ("txt2img", "inpainting", None, "inpainting", "is an inpainting model: use `inpaint`"),
        ("txt2img", "base", "base", "base", "is Stable Diffusion XL, not the refiner of Stable"
         " Diffusion XL"),
        ("txt2img", "sd1", "refiner", "sd1", "is Stable Diffusion 1: a refiner needs Stable"
         " Diffusion XL"),
    ],
)  # fmt: skip
def test_a_file_of_another_family_is_refused(
    files, command, base, refiner, wrong, message, run_ldm, tmp_path
):
    flags = ["--refiner", files[refiner]] if refiner else []
    error = run_ldm(command, "--ckpt", files[base], "--outdir", tmp_path, *flags).error
    assert f"error: `{files[wrong].name}` {message}" in error


@pytest.mark.parametrize(
    ("family", "is_refiner", "message"),
    [
        ("xl-refiner", False, "`xl-refiner` is the refiner of Stable Diffusion XL: use"),
        ("xl", True, "`xl` is a text-to-image model, not the refiner of Stable Diffusion XL"),
    ],
)
def test_a_folder_of_another_family_is_refused(family, is_refiner, message, run_ldm, tmp_path):
    """The configs suffice: the weights of the UNet are missing."""
    tinyfamilies.write_family(family, tmp_path / "file.safetensors")
    folder = convert(plan_conversion(tmp_path / "file.safetensors", tmp_path / family))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    flags = ["--refiner", folder] if is_refiner else []
    error = run_ldm("txt2img", "--ckpt", folder, "--outdir", tmp_path, *flags).error
    assert f"error: {message}" in error
