"""LDM3D: conversion between files and folders, and diffusers' pipeline on a folder of ours."""

import functools

import numpy as np
import pytest
import torch
from tinyfamilies import PROMPT, write

import ldm
from ldm.commands.convert import main
from ldm.imaging.rgbd import split_depth
from ldm.loading.files.checkpoint import read_checkpoint
from quick import some

pytestmark = pytest.mark.filterwarnings("ignore")  # about the future of other packages

FAMILIES = ("ldm3d", "ldm3d-4c", "ldm3d-sr")


def convert(source, target):
    assert main([str(source), str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Family -> (weights of a tiny file, that file, its folder), each made once."""
    folder = tmp_path_factory.mktemp("ldm3d")

    @functools.cache
    def make(name):
        state = write(name, file := folder / f"{name}.safetensors")
        return state, file, convert(file, folder / name)

    return make


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("name", some(FAMILIES, "ldm3d-sr"))
def test_a_file_becomes_a_folder_and_the_same_file_again(files, name, tmp_path):
    state, file, folder = files(name)
    assert same(read_checkpoint(convert(folder, tmp_path / "back.safetensors")).state, state)
    model = ldm.load(folder)
    assert same(model.state_dict(), ldm.load(file).state_dict())
    assert model.autoencoder.in_channels == (6 if name == "ldm3d" else 4)
    assert model.defaults.scale == (9 if name == "ldm3d-sr" else 5)


@pytest.mark.parametrize("name", some(FAMILIES[:2], "ldm3d-4c"))
def test_diffusers_pipeline_makes_the_same_images(diffusers, files, name, tmp_path):
    """With `np`, whose depth is right for four channels only."""
    folder = files(name)[2]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipe).__name__ == "StableDiffusionLDM3DPipeline"
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 4, "output_type": "np", "latents": x.clone()}
    theirs = pipe(PROMPT, height=32, width=32, **options)
    saved = ldm.load(tmp_path)  # as diffusers writes it
    ours = ldm.txt2img(saved, [PROMPT], size=(32, 32), steps=4, x_T=x)
    unit = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(unit[..., :3] - theirs.rgb).max() < 1e-4
    if name == "ldm3d-4c":
        assert np.abs(unit[..., 3:] - theirs.depth).max() < 1e-4
        level = np.array(split_depth(ours)[0], int)
        assert np.abs(level - 65535 * theirs.depth[0, ..., 0]).max() < 8
