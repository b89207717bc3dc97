"""Data sections of configs: ours, the original's, and those of generative-models."""

from typing import Any

import pytest

from ldm.loading.config import parse_yaml, read_yaml
from ldm.train.config.datamodules import read_data, translate_data_module
from ldm.train.config.schema import DataOptions

FOLDER = "{root: images, transform: {name: photo, size: 32}}"
# As in v2-inpainting-inference.yaml, with other addresses.
WEB_DATA = """
  target: ldm.data.laion.WebDataModuleFromConfig
  params:
    tar_base: null
    p_unsafe_threshold: 0.1
    filter_word_list: data/filters.yaml
    max_pwatermark: 0.45
    batch_size: 8
    num_workers: 6
    multinode: true
    min_size: 512
    train:
      shards: ["pipe:aws s3 cp s3://somewhere/{00000..18699}.tar -"]
      shuffle: 10000
      image_key: jpg
      image_transforms:
      - {target: torchvision.transforms.Resize, params: {size: 512, interpolation: 3}}
      - {target: torchvision.transforms.RandomCrop, params: {size: 512}}
      postprocess:
        target: ldm.data.laion.AddMask
        params: {mode: 512train-large, p_drop: 0.25}
"""
WEB_TRANSLATION = """
  batch_size: 8
  num_workers: 6
  train:
    shards: ["pipe:aws s3 cp s3://somewhere/{00000..18699}.tar -"]
    shuffle: 1250
    transform:
      {name: photo, flip: 0.0, size: 512, crop: random,
       conditions: {mask: {full_probability: 0.25}}}
    minimum: {original_width: 512, original_height: 512}
    maximum: {pwatermark: 0.45, punsafe: 0.1}
"""
# As in the examples of generative-models.
SGM_DATA = """
  target: sgm.data.dataset.StableDataModuleFromConfig
  params:
    train:
      datapipeline:
        urls: [DATA-PATH]
        pipeline_config: {shardshuffle: 10000, sample_shuffle: 10000}
        decoders: [pil]
        postprocessors:
        - target: sdata.mappers.TorchVisionImageTransforms
          params:
            key: jpg
            transforms:
            - {target: torchvision.transforms.Resize, params: {size: 256, interpolation: 3}}
            - {target: torchvision.transforms.ToTensor}
        - {target: sdata.mappers.Rescaler}
        - target: sdata.mappers.AddOriginalImageSizeAsTupleAndCropToSquare
          params: {h_key: height, w_key: width}
      loader: {batch_size: 64, num_workers: 6}
"""
SGM_TRANSLATION = """
  batch_size: 64
  num_workers: 6
  train:
    shards: [DATA-PATH]
    shuffle: 1250
    transform:
      {name: photo, flip: 0.0, size: 256, crop: random, original_size_keys: [height, width]}
"""


def parse(text: str) -> dict[str, Any]:
    return parse_yaml(f"data: {text}")["data"]


def test_the_data_module_of_tar_files_is_translated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert read_data(parse(WEB_DATA)) == DataOptions(**parse(WEB_TRANSLATION))
    assert "filter_word_list is ignored: captions are NOT filtered" in caplog.text
    assert "data.params.train.postprocess.mode is ignored" in caplog.text


def test_the_data_module_of_sgm_is_translated() -> None:
    translated = translate_data_module(parse(SGM_DATA))
    assert read_data(translated) == DataOptions(**parse(SGM_TRANSLATION))
    with pytest.raises(ValueError, match=r"data: `sgm.data.mnist.MNISTLoader` is not supported"):
        read_data(translate_data_module(parse("{target: sgm.data.mnist.MNISTLoader}")))
    for key in ("", ".loader", ".datapipeline", ".datapipeline.pipeline_config"):
        data = parse_yaml(f"data: {SGM_DATA}", [f"data.params.train{key}=x"])["data"]
        with pytest.raises(ValueError, match=rf"data.params.train{key}: `x` should be a mapping"):
            translate_data_module(data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.params.train=3", "data.params.train: `3` should be a mapping"),
        ("data.params.train.shuffle=abc", "data.params.train.shuffle: `abc` should be a whole"),
        ("data.params.train.shards=3", "data.params.train.shards: `3` should be"),
    ],
)
def test_an_invalid_data_module_of_tar_files_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_data(parse_yaml(f"data: {WEB_DATA}", [override])["data"])


def test_our_data_section_is_read_without_translation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    text = f"batch_size: 4, train: {FOLDER}, validation: {FOLDER}"
    data = parse(f"{{target: main.DataModuleFromConfig, params: {{wrap: true, {text}}}}}")
    assert read_data(data) == DataOptions(**parse(f"{{{text}}}"))
    assert caplog.messages == ["data.params.wrap is ignored: samples depend on their index only"]


def test_former_options_of_a_transform_are_read(caplog: pytest.LogCaptureFixture) -> None:
    train = "{root: a, transform: {name: photo, flip: true, crop: centre, records: {mask: {}}}}"
    data = read_data(parse(f"{{params: {{batch_size: 1, train: {train}}}}}"))
    expected = {"name": "photo", "flip": 1.0, "crop": "center", "conditions": {"mask": {}}}
    assert data.train["transform"] == expected
    assert "data.params.train.transform.flip: `true` mirrors every image" in caplog.text


@pytest.mark.parametrize(
    ("spec", "translation"),
    [
        ("{target: ldm.data.simple.FolderData, params: {root_dir: images, ext: jpg}}",
         "{root: images, transform: {name: photo, flip: 0.0}}"),
        ("{target: ldm.data.simple.FolderData, params: {root_dir: images, caption_file: x.jsonl}}",
         "{root: images, metadata: x.jsonl, transform: {name: photo, flip: 0.0}}"),
        ("{target: ldm.data.simple.FolderData, params: {root_dir: images, default_caption: a fox}}",
         "{root: images, fields: {text: a fox}, transform: {name: photo, flip: 0.0}}"),
        (
            """{target: ldm.data.simple.hf_dataset, params: {
                name: lambdalabs/pokemon-blip-captions, text_column: text, image_transforms: [
                    {target: torchvision.transforms.Resize, params: {size: 512}},
                    {target: torchvision.transforms.RandomHorizontalFlip}]}}""",
            """{hub: lambdalabs/pokemon-blip-captions, text: text,
                transform: {name: photo, flip: 0.5, size: 512}}""",
        ),
    ],
)  # fmt: skip
def test_simple_datasets_are_translated(spec: str, translation: str) -> None:
    data = read_data(parse(f"{{params: {{batch_size: 1, train: {spec}}}}}"))
    assert data.train == parse(translation)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("train: {target: taming.data.faceshq.CelebAHQTrain, params: {size: 256}}",
         r"data.params.train: `taming.*` is not supported.*{root: DIR, .*size: 256"),
        ("train: {target: ldm.data.simple.FolderData, params: {root_dir: x, image_transforms: "
         "[{target: torchvision.transforms.Resize}]}}", "data.params.train: Resize needs `size`"),
        ("train: {target: ldm.data.simple.FolderData, params: {root_dir: x, image_transforms: "
         "[{target: torchvision.transforms.Resize, params: 512}]}}",
         "data.params.train: `params` of Resize should be a mapping of keys, got `512`"),
        (f"train: {FOLDER}, batch_size: null", "needs `batch_size`"),
        (f"train: {FOLDER}, worker: 1", "unknown key `worker`, did you mean `num_workers`"),
        ("train: {root: null}", "needs one of `root`"),
        ("train: {root: a, hub: b}", "has `root` and `hub`: set"),
        ("train: {root: a, transform: photo}", "needs `transform`"),
        ("train: {root: a, transform: {name: photo, tags: {kept: 1}}}",
         "data.params.train.transform.tags: unknown key `kept`, did you mean `keep`"),
        ("train: {root: a, transform: {name: photo, buckets: {steps: 8}}}",
         "data.params.train.transform.buckets: unknown key `steps`, did you mean `step`"),
        ("train: {root: a, transform: {name: photo, size: abc}}",
         "data.params.train.transform.size: `abc` should be a whole number"),
        ("train: {root: a, transform: {name: photo, flip: 2}}",
         "data.params.train.transform.flip: `2` should be less than or equal to 1"),
        ("train: {root: a, transform: {name: photo, conditions: {mask: 3}}}",
         "data.params.train.transform.conditions.mask: `3` should be a mapping"),
        ("train: {root: a, transform: {name: emoji, scale: [1]}}",
         r"data.params.train.transform.scale: `\(1,\)` has too few values"),
        ("train: {root: a, transform: {name: photo, original_size_keys: [height]}}",
         r"original_size_keys: `\['height'\]` has too few values"),
        ("train: {root: 3, transform: {name: photo}}", "data.params.train.root: `3` should be"),
        ("train: {root: a, where: 3, transform: {name: photo}}",
         "train.where: `3` should be a map"),
        ("train: {shards: x, transform: {}}, "
         "prior: {root: x, prompt: a dog, count: 1, transform: {}}",
         "`prior` needs a folder or a hub"),
        (f"train: {FOLDER}, prior: {{counts: 1}}",
         "data.params.prior: unknown key `counts`, did you mean `count`"),
        (f"train: {FOLDER}, texts: {{batch_size: 1}}", "data.params.texts needs `cache_dir`"),
        ("train: {target: ldm.data.simple.FolderData, params: "
         "{root_dir: x, postprocess: {target: ldm.data.simple.AddLR}}}",
         "data.params.train.postprocess: AddLR needs `factor`"),
        (f"train: {FOLDER}, latents: {{cache_dir: x, variant: 2}}",
         "data.params.latents: unknown key `variant`, did you mean `variants_per_image`"),
    ],
)  # fmt: skip
def test_invalid_data_sections_are_refused(params: str, message: str) -> None:
    data = parse(f"{{params: {{{params}}}}}")
    data["params"].setdefault("batch_size", 1)
    with pytest.raises(ValueError, match=message):
        read_data(data)


def test_a_folder_replaces_an_unsupported_dataset() -> None:
    path = "configs/autoencoder/autoencoder_kl_32x32x4.yaml"
    photo = "{name: photo, size: 256, crop: random}"
    overrides = ["root=photos", f"transform={photo}"]
    config = read_yaml(path, [f"data.params.train.{override}" for override in overrides])
    config["data"]["params"]["validation"] = None
    assert read_data(config["data"]).train == parse(f"{{root: photos, transform: {photo}}}")
    with pytest.raises(ValueError, match="ImageNetSRTrain` is not supported"):
        read_data(read_yaml(path)["data"])
