"""Batches of a run from the data section of its config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.data.drawings import EmojiTransform
from ldm.data.folder import ImageFolder
from ldm.data.pack import write_shards
from ldm.train.batches.sources import check_data, open_batches
from ldm.train.config.datamodules import read_data
from ldm.train.config.schema import DataOptions
from train.tinyrun import EMOJI, build_tiny_model

FOLDER = {"root": EMOJI, "split": "train", "transform": {"name": "emoji", "size": 16}}
SHARDS = {"shards": "x-*.tar", "transform": {"name": "emoji", "size": 16}}


def make_data(**params: Any) -> DataOptions:
    return read_data({"params": {"batch_size": 4, "train": FOLDER, **params}})


def test_training_and_validation_may_be_splits_of_a_folder() -> None:
    data = make_data(validation={**FOLDER, "split": "heldout"})
    train, held_out = open_batches(nn.Identity(), data, 23)
    assert held_out is not None
    assert (train.get_batches_per_epoch(1), held_out.get_batches_per_epoch(1)) == (23, 1)
    batch = next(train.iter_batches(4, start=2))
    assert batch["jpg"].shape == (4, 3, 16, 16)
    first, second = (held_out.load_fixed_samples(1)[0]["jpg"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"train": {**FOLDER, "splits": "train"}}, "data.params.train: unknown key `splits`"),
        ({"train": {**SHARDS, "allow_commands": True}}, "unknown key `allow_commands`"),
        ({"train": {**FOLDER, "transform": {"name": "photo", "scale": [1, 1]}}},
         "data.params.train.transform: unknown key `scale`.* choose one of name, size, crop"),
        ({"train": {**SHARDS, "shards": "pipe:true"}}, "a config may not run"),
        ({"train": {**FOLDER, "transform": {"name": "emojis"}}}, "did you mean `emoji`"),
    ],
)  # fmt: skip
def test_invalid_data_sections_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_batches(nn.Identity(), make_data(**params), 23)


def test_the_transform_of_class_images_is_checked_before_they_are_sampled() -> None:
    transform = {"name": "photo", "sizes": 8}
    prior = {"root": "missing", "prompt": "a dog", "count": 1, "transform": transform}
    with pytest.raises(ValueError, match=r"data.params.prior.transform: unknown key `sizes`"):
        check_data(make_data(prior=prior))


def test_an_autoencoder_cannot_use_caches(tmp_path: Path) -> None:
    data = make_data(latents={"cache_dir": tmp_path}, texts={"cache_dir": tmp_path})
    with pytest.raises(ValueError, match="`latents`, `texts` are for diffusion models only"):
        open_batches(nn.Identity(), data, 23)


@pytest.mark.parametrize(
    ("split", "folder", "message"),
    [
        ("train", "nope", "there is no folder `.*nope`"),
        ("validation", "", "`.*` has no metadata.jsonl, metadata.csv or images"),
    ],
)
def test_a_folder_without_images_is_named_with_its_key(
    split: str, folder: str, message: str, tmp_path: Path
) -> None:
    data = make_data(**{split: {**FOLDER, "root": tmp_path / folder}})
    with pytest.raises(FileNotFoundError, match=rf"^data\.params\.{split}\.root: {message}$"):
        open_batches(nn.Identity(), data, 23)


def test_a_key_of_another_transform_may_be_null() -> None:
    train: dict[str, Any] = {**FOLDER, "transform": {"name": "emoji", "size": 16, "tags": None}}
    assert make_data(train=train) == make_data()


def test_images_without_metadata_are_refused_for_drawings(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16)).save(tmp_path / "a.png")
    data = make_data(train={**FOLDER, "split": None, "root": tmp_path})
    source, _ = open_batches(nn.Identity(), data, 23)
    with pytest.raises(ValueError, match="`a.png` has no `object` .* the transform `emoji` needs"):
        next(source.iter_batches(1))


def test_an_unreadable_caption_is_skipped_like_a_damaged_image(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    model = build_tiny_model()
    model.conditioner.text.requires_grad_(False)
    train = {"root": tmp_path, "transform": {"name": "photo", "size": 16}}
    caches = {key: {"cache_dir": str(tmp_path / key)} for key in ("latents", "texts")}
    for params in ({}, {"latents": caches["latents"]}, caches):
        source, _ = open_batches(model, make_data(train=train, **params), 23)
        batch = next(source.iter_batches(3))
        assert set(batch["txt"]) == {"a", "c"}
        assert batch["unreadable"] == ["b.png"]


def test_shards_are_opened_by_their_pattern(tmp_path: Path) -> None:
    folder = ImageFolder(root=EMOJI, transform=EmojiTransform(), split="train")
    list(write_shards(folder, str(tmp_path / "%06d.tar"), count=8))
    data = make_data(train={**SHARDS, "shards": f"{tmp_path}/{{000000..000002}}.tar"})
    train, _ = open_batches(nn.Identity(), data, 23)
    assert next(train.iter_batches(4))["jpg"].shape == (4, 3, 16, 16)
    model = build_tiny_model()
    open_batches(model, make_data(train={**SHARDS, "shards": f"{tmp_path}/*.tar"}), 23)
    text = model.conditioner.text
    token_ids = text.token_ids.clone()
    text.token_ids.copy_(torch.arange(len(token_ids)))
    open_batches(model, make_data(), 23)
    assert torch.equal(text.token_ids, token_ids)  # a folder has the vocabulary of its shards


def test_images_without_captions_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = build_tiny_model()
    photos = {**FOLDER, "split": None, "transform": {"name": "photo", "size": 16}}
    open_batches(model, make_data(train=photos), 23)
    assert "24 of 24 images" in caplog.text
