"""Karlo's files: statistics of image embeddings, and the prior."""

import pytest
import torch

from ldm.conditioning import Conditioner
from ldm.encoders.image import EmbeddingNoise, ImageEmbedding, OpenCLIPImage
from ldm.loading.addons.karlo import load_prior
from ldm.loading.files.clip_statistics import (
    get_clip_statistics,
    load_clip_statistics,
    read_clip_statistics,
)
from ldm.nets.karlo import Prior

MEAN, STD = torch.arange(8.0), torch.arange(8.0) + 1


def build_conditioner():
    noise = EmbeddingNoise(timestep_dim=8, clip_stats_path="karlo/stats.th")
    clip = OpenCLIPImage(arch={"vision_cfg": {"layers": 0}, "text_cfg": {"width": 8, "heads": 1}})
    return Conditioner(image=ImageEmbedding(clip=clip, noise=noise))


def has_statistics(conditioner):
    mean, std = conditioner.image.noise.statistics
    return torch.equal(mean[0], MEAN) and torch.equal(std[0], STD)


def test_statistics_are_read_from_the_argument_else_the_checkpoint_else_its_folder(tmp_path):
    torch.save((MEAN, STD), tmp_path / "stats.th")
    conditioner = build_conditioner()
    load_clip_statistics(conditioner, tmp_path / "model.ckpt")
    assert has_statistics(conditioner)
    (tmp_path / "stats.th").unlink()  # not overwritten, as tensors are mapped from it
    torch.save((MEAN * 0, STD), tmp_path / "stats.th")
    conditioner.image.noise.set_statistics(MEAN, STD)
    saved = get_clip_statistics(conditioner)
    conditioner = build_conditioner()
    load_clip_statistics(conditioner, tmp_path / "model.ckpt", None, saved)
    assert has_statistics(conditioner)
    torch.save((MEAN[None], STD[None]), tmp_path / "other.th")
    ignored = {name: value * 0 for name, value in saved.items()}
    load_clip_statistics(conditioner, tmp_path / "model.ckpt", tmp_path / "other.th", ignored)
    assert has_statistics(conditioner)


def test_missing_statistics_are_reported_when_the_model_is_used(tmp_path):
    conditioner = build_conditioner()
    load_clip_statistics(conditioner, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"karlo/stats.th") as caught:
        conditioner.image.noise(torch.zeros(1, 8), 0, torch.zeros(1, 8))
    assert "\n" not in str(caught.value)


def test_a_model_without_statistics_has_no_tensors_for_them(tmp_path):
    conditioner = build_conditioner()
    assert get_clip_statistics(conditioner) == {}
    conditioner.image.noise.set_statistics(MEAN, STD)
    conditioner.image.noise.clip_stats_path = None  # trained with mean 0 and deviation 1
    assert get_clip_statistics(conditioner) == get_clip_statistics(Conditioner()) == {}
    load_clip_statistics(Conditioner(), tmp_path / "model.ckpt", "absent.th")  # does nothing


@pytest.mark.parametrize("content", [{"a": MEAN}, [MEAN, 3], MEAN, {}])
def test_files_without_statistics_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "stats.th")
    with pytest.raises(ValueError, match="does not contain a mean and a standard deviation"):
        read_clip_statistics(tmp_path / "stats.th")


@pytest.mark.parametrize("final_ln", [True, False])
def test_a_prior_is_built_with_the_sizes_of_its_file(tmp_path, final_ln):
    torch.manual_seed(0)
    sizes = {"clip_dim": 8, "xf_width": 16, "xf_layers": 3, "xf_heads": 2, "text_ctx": 7}
    prior = Prior(**sizes, xf_final_ln=final_ln)
    state = {f"model.{name}": value for name, value in prior.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "prior.ckpt")
    loaded = load_prior(tmp_path / "prior.ckpt", heads=2)
    inputs = torch.randn(1, 8), torch.tensor([3]), torch.randn(1, 7, 8), torch.randn(1, 8)
    assert torch.equal(loaded(*inputs), prior.eval()(*inputs))


def test_a_file_that_is_not_a_prior_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="is not the file of a Karlo prior"):
        load_prior(tmp_path / "x.ckpt")
