"""Data sections in the original's words."""

from typing import Any

import pytest

from ldm.loading.config import read_yaml
from ldm.train.config.datamodules import translate

PHOTO = {"name": "photo", "size": 32}
FOLDER = {"root": "pictures", "transform": PHOTO}
# As in v2-inpainting-inference.yaml, but for the addresses.
WEB = {
    "target": "ldm.data.laion.WebDataModuleFromConfig",
    "params": {
        "tar_base": None,
        "p_unsafe_threshold": 0.1,
        "filter_word_list": "data/filters.yaml",
        "max_pwatermark": 0.45,
        "batch_size": 8,
        "num_workers": 6,
        "multinode": True,
        "min_size": 512,
        "train": {
            "shards": ["pipe:aws s3 cp s3://somewhere/{00000..18699}.tar -"],
            "shuffle": 10000,
            "image_key": "jpg",
            "image_transforms": [
                {
                    "target": "torchvision.transforms.Resize",
                    "params": {"size": 512, "interpolation": 3},
                },
                {"target": "torchvision.transforms.RandomCrop", "params": {"size": 512}},
            ],
            "postprocess": {
                "target": "ldm.data.laion.AddMask",
                "params": {"mode": "512train-large", "p_drop": 0.25},
            },
        },
    },
}


def test_the_data_module_of_tar_files_is_read() -> None:
    params, notes = translate(WEB)
    assert params == {
        "batch_size": 8,
        "num_workers": 6,
        "train": {
            "shards": ["pipe:aws s3 cp s3://somewhere/{00000..18699}.tar -"],
            "shuffle": 1250,
            "transform": {
                "name": "photo",
                "flip": 0.0,
                "size": 512,
                "crop": "random",
                "conditions": {"mask": {"full_probability": 0.25}},
            },
            "minimum": {"original_width": 512, "original_height": 512},
            "maximum": {"pwatermark": 0.45, "punsafe": 0.1},
        },
    }
    assert any("filter_word_list: captions are NOT filtered" in note for note in notes)


def test_our_own_form_goes_through_and_the_rest_is_named() -> None:
    given = {"batch_size": 4, "wrap": True, "train": FOLDER, "validation": FOLDER}
    params, notes = translate({"target": "main.DataModuleFromConfig", "params": given})
    assert params == {"batch_size": 4, "train": FOLDER, "validation": FOLDER}
    assert notes == ["data.params.wrap: samples depend on their number alone"]


@pytest.mark.parametrize(
    ("spec", "ours"),
    [
        (
            {
                "target": "ldm.data.simple.FolderData",
                "params": {"root_dir": "pictures", "ext": "jpg"},
            },
            {"root": "pictures", "transform": {"name": "photo", "flip": 0.0}},
        ),
        (
            {
                "target": "ldm.data.simple.hf_dataset",
                "params": {
                    "name": "lambdalabs/pokemon-blip-captions",
                    "text_column": "text",
                    "image_transforms": [
                        {"target": "torchvision.transforms.Resize", "params": {"size": 512}},
                        {"target": "torchvision.transforms.RandomHorizontalFlip"},
                    ],
                },
            },
            {
                "hub": "lambdalabs/pokemon-blip-captions",
                "split": "train",
                "image": "image",
                "text": "text",
                "transform": {"name": "photo", "flip": 0.5, "size": 512},
            },
        ),
    ],
)
def test_simple_data_sets_are_read(spec: dict[str, Any], ours: dict[str, Any]) -> None:
    assert translate({"params": {"batch_size": 1, "train": spec}})[0]["train"] == ours


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {
                "params": {
                    "batch_size": 1,
                    "train": {
                        "target": "taming.data.faceshq.CelebAHQTrain",
                        "params": {"size": 256},
                    },
                }
            },
            r"data.params.train: `taming.*` cannot be read.*{root: DIR, .*size: 256",
        ),
        ({"target": "sgm.data.mnist.MNISTLoader"}, "data: `sgm.data.mnist.MNISTLoader` cannot"),
        ({"params": {"train": FOLDER}}, "needs `batch_size`"),
        ({"params": {"batch_size": 1, "train": FOLDER, "worker": 1}}, "did you mean"),
        ({"params": {"batch_size": 1, "train": {**FOLDER, "root": None}}}, "needs one of `root`"),
        (
            {"params": {"batch_size": 1, "train": {**FOLDER, "hub": "x"}}},
            "has `root` and `hub`: set",
        ),
    ],
)
def test_what_cannot_be_read_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate(data)


def test_a_folder_takes_the_place_of_data_that_nobody_has() -> None:
    name = "configs/autoencoder/autoencoder_kl_32x32x4.yaml"
    photo = "{name: photo, size: 256, crop: random}"
    given = ["data.params.train.root=photos", f"data.params.train.transform={photo}"]
    raw = read_yaml(name, [*given, "data.params.validation=null"])
    params, _ = translate(raw["data"])
    wanted = {"name": "photo", "size": 256, "crop": "random"}
    assert params["train"] == {"root": "photos", "transform": wanted}
    with pytest.raises(ValueError, match="ImageNetSRTrain` cannot be read here"):
        translate(read_yaml(name)["data"])
