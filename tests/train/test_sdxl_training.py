"""SDXL's base, refiner and inpainting model go through the one trainer, and read sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldm
from ldm.conditioning import Cond
from ldm.encoders.text import TextEncoder
from ldm.loading.addons.embeddings import load_embeddings
from ldm.loading.addons.lora import read_lora
from ldm.loading.config import parse_yaml
from ldm.train.loop import train
from ldm.train.monitoring.samples import sample_images
from ldm.train.run import Run
from loading.tinyfamilies import small, write
from tests.train.tinyrun import run_of

DATA = """
data:
  params:
    batch_size: 2
    latents: {cache: CACHE/latents}
    texts: {cache: CACHE/texts}
    train:
      root: PHOTOS
      transform: {name: photo, size: 64, flip: 0.0, buckets: {step: 32}}
lightning:
  trainer: {max_steps: 2, sanity: false}
  optimizer: {name: adamw, ema_decay: 0.9}
  callbacks: {images: 2, loggers: [csv], sampling: {steps: 2}}
"""
SIZES = {(64, 64): 3, (128, 32): 2}  # width, height


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rows = []
    for size, count in SIZES.items():
        for number in range(count):
            name = f"{size[0]}-{number}.png"
            noise = torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(root / name)
            rows.append({"file_name": name, "text": f"photo {number}", "aesthetic_score": number})
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def make_run(family: str, photos: Path, folder: Path, *overrides: str) -> Run:
    text = DATA.replace("PHOTOS", str(photos)).replace("CACHE", str(folder.parent))
    raw = parse_yaml(text, overrides)
    config: dict[str, Any] = {"model": small(family)["model"] | {"base_learning_rate": 1e-3}, **raw}
    return run_of(config, folder)


@pytest.mark.parametrize(
    ("family", "keys", "overrides"),
    [
        ("xl", {"txt"}, []),
        ("xl-refiner", {"txt", "aesthetic_score"}, ["lightning.objective.timesteps=[0,200]"]),
        (
            "xl-inpainting",
            {"txt", "masked", "aesthetic_score"},
            ["data.params.train.transform.conditions={mask: {}}"],
        ),
    ],
)
def test_every_model_is_trained_sampled_and_exported(
    family: str, keys: set[str], overrides: list[str], photos: Path, tmp_path: Path
) -> None:
    run = make_run(family, photos, tmp_path / "run", *overrides)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    source: Any = run.source
    sample = source.dataset[0, 4]
    assert keys <= sample.keys()
    assert sample["original_size_as_tuple"].tolist() == [32, 128]
    assert sample["crop_coords_top_left"].tolist() == [0, 0]
    assert float(sample["aesthetic_score"]) == 1.0
    train(run)
    changed = {
        name for name, value in run.model.state_dict().items() if not value.equal(before[name])
    }
    assert {name.split(".")[0] for name in changed} == {"unet"}
    assert len(list((run.folder / "images" / "train").glob("*.png"))) == 1
    model = ldm.load(None, run.checkpoints / "last.safetensors")
    first = "unet.input_blocks.0.0.weight"
    shadow = run.state.ema.shadow[first].half().float()
    assert model.state_dict()[first].float().equal(shadow)


@pytest.mark.parametrize("legacy", [[], ["zero-sizes-in-previews"]])
def test_the_unconditional_half_of_a_grid_keeps_its_sizes(
    legacy: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = f"lightning.objective.legacy={legacy}"
    run = make_run("xl", photos, tmp_path / "run", "data.params.texts=null", objective)
    conds: list[Cond] = []

    def sample(model: Any, *both: Cond, **_: Any) -> torch.Tensor:
        conds.extend(both)
        return torch.zeros(1, 4, 8, 8)

    monkeypatch.setattr("ldm.train.monitoring.samples.sample", sample)
    sample_images(run, run.model, run.source.fixed_samples(1))
    (cond, uncond), pooled = [value.vector for value in conds], 40
    assert not uncond[:, :pooled].any()
    assert uncond[:, pooled:].equal(cond[:, pooled:]) == (not legacy)
    assert uncond[:, pooled:].any() == (not legacy)


def test_a_lora_and_a_token_of_both_text_encoders_are_trained_and_used(
    photos: Path, tmp_path: Path
) -> None:
    run = make_run(
        "xl",
        photos,
        tmp_path / "run",
        "data.params.texts=null",
        "data.params.train.fields.text=a <thing>",
        "lightning.lora={rank: 2, targets: [attention, text]}",
        "lightning.textual_inversion={token: <thing>, vectors: 3, init: cat}",
        "lightning.callbacks.images=0",
    )
    train(run)
    trained = dict(run.state.ema.shadow)
    vectors = [trained["word.vectors"], trained["word.vectors_2"]]
    assert [tuple(value.shape) for value in vectors] == [(3, 32), (3, 48)]
    encoders = run.model.conditioner.find_all(TextEncoder)
    for encoder, value in zip(encoders, vectors, strict=True):
        assert not torch.equal(value, encoder.token_embeddings("cat").expand(3, -1))

    model = run_of_base(tmp_path)
    load_embeddings(model, [run.checkpoints / "last-word.safetensors"])
    for encoder, value in zip(model.conditioner.find_all(TextEncoder), vectors, strict=True):
        assert torch.equal(next(iter(encoder.added_embeddings.values())), value)
    for style in ("last", "last-diffusers"):
        lora: Any = read_lora(run.checkpoints / f"{style}.safetensors", model)
        names = {f"lora.{name}" for name, _ in lora.named_parameters()}
        assert names == {name for name in trained if name.startswith("lora.")}
        assert {name.split("_")[1] for name in lora} == {"unet", "te1", "te2"}


def run_of_base(folder: Path) -> Any:
    path = folder / "base.safetensors"
    write("xl", path)
    return ldm.load(None, path)
