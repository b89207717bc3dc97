"""LDM3D: diffusers folders, and diffusers' pipeline on a folder of ours."""

import shutil

import numpy as np
import pytest
import torch

import ldm
from ldm.imaging.rgbd import split_depth
from ldm.loading.diffusers.layout import EXTRA_WEIGHTS
from loading.tinyfamilies import PROMPT
from nets.nethelp import make_noise
from quick import slow_except

pytestmark = pytest.mark.filterwarnings("ignore")  # about the future of other packages

FAMILIES = ("ldm3d", "ldm3d-4c", "ldm3d-sr")


@pytest.mark.parametrize("name", slow_except(FAMILIES, "ldm3d-sr"))
def test_a_folder_is_loaded_like_its_file(convert_family, name):
    source, _, folder = convert_family(name)
    model, expected = ldm.load(folder), ldm.load(source).state_dict()
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    assert model.autoencoder.in_channels == (6 if name == "ldm3d" else 4)
    scale_and_steps = (9, 75) if name == "ldm3d-sr" else (5, 49)
    assert (model.defaults.scale, model.defaults.steps) == scale_and_steps


def test_a_folder_without_the_unused_scheduler_is_read(convert_family, tmp_path):
    folder = shutil.copytree(convert_family("ldm3d-sr")[2], tmp_path / "folder")
    shutil.rmtree(folder / "low_res_scheduler")
    (folder / EXTRA_WEIGHTS).unlink(missing_ok=True)
    assert "rgbd" in ldm.load(folder).conditioner.encoders


@pytest.mark.parametrize("name", slow_except(FAMILIES[:2], "ldm3d-4c"))
def test_diffusers_pipeline_makes_the_same_images(diffusers, convert_family, name, tmp_path):
    """Its output type `np` has the right depth for four channels only."""
    folder = convert_family(name)[2]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipe).__name__ == "StableDiffusionLDM3DPipeline"
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    x_T = make_noise(1, 4, 16, 16)
    options = {"num_inference_steps": 4, "output_type": "np", "latents": x_T.clone()}
    theirs = pipe(PROMPT, height=32, width=32, **options)
    saved = ldm.load(tmp_path)  # as diffusers writes it
    ours = ldm.txt2img(saved, [PROMPT], size=(32, 32), steps=4, x_T=x_T)
    pixels = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels[..., :3] - theirs.rgb).max() < 1e-4
    if name == "ldm3d-4c":
        assert np.abs(pixels[..., 3:] - theirs.depth).max() < 1e-4
        depth = np.array(split_depth(ours)[0], int)
        assert np.abs(depth - 65535 * theirs.depth[0, ..., 0]).max() < 8
