"""Training of SDXL's base, refiner and inpainting model, with size conditioning."""

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
from ldm.loading.config import parse_yaml
from ldm.runtime.errors import ArgumentError
from ldm.train.loop import train
from ldm.train.monitoring.samples import sample_images
from ldm.train.run import Run
from ldm.train.tasks.diffusion import DiffusionTask
from ldm.train.tasks.noise_levels import LogNormal
from loading.lorahelp import read_lora
from loading.tinyfamilies import make_small_config, write_family
from train.tinyrun import build_run_from

pytestmark = pytest.mark.usefixtures("no_states")
CONFIG = """
data:
  params:
    batch_size: 2
    latents: {cache_dir: CACHE/latents}
    texts: {cache_dir: CACHE/texts}
    train:
      root: PHOTOS
      transform: {name: photo, size: 64, flip: 0.0, buckets: {step: 32}}
lightning:
  trainer: {max_steps: 2, check_initial_loss: false}
  optimizer: {name: adamw, ema_decay: 0.9}
  callbacks: {max_images: 2, loggers: [csv], sampling: {steps: 2}}
"""
MASKS = "data.params.train.transform.conditions={mask: {}}"
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


def make_config(family: str, photos: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    text = CONFIG.replace("PHOTOS", str(photos)).replace("CACHE", str(folder.parent))
    model = make_small_config(family)["model"] | {"base_learning_rate": 1e-3}
    return {"model": model, **parse_yaml(text, overrides)}


def make_run(family: str, photos: Path, folder: Path, *overrides: str) -> Run:
    return build_run_from(make_config(family, photos, folder, *overrides), folder)


@pytest.mark.parametrize(
    ("family", "keys", "overrides"),
    [
        pytest.param("xl", {"txt"}, [], marks=pytest.mark.slow),
        pytest.param(
            "xl-refiner",
            {"txt", "aesthetic_score"},
            ["lightning.objective.timestep_range=[0,200]"],
            marks=pytest.mark.slow,
        ),
        (
            "xl-inpainting",
            {"txt", "masked", "aesthetic_score"},
            [
                MASKS,
                "data.params.validation=${data.params.train}",
                "lightning.callbacks.validate_steps=1",
            ],
        ),
    ],
)
def test_a_model_is_trained_samples_and_is_exported(
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
    is_validated = "val/loss_ema" in (run.folder / "log.csv").read_text()
    assert is_validated == (run.validation_source is not None)
    model = ldm.load(None, run.checkpoints / "last.safetensors")
    name = "unet.input_blocks.0.0.weight"
    shadow = run.state.ema.shadow[name].half().float()
    assert model.state_dict()[name].float().equal(shadow)


@pytest.mark.parametrize("legacy", [[], ["zero-sizes-in-previews"]])
def test_the_unconditional_input_of_sample_grids_keeps_the_sizes(
    legacy: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = f"lightning.objective.legacy={legacy}"
    run = make_run("xl", photos, tmp_path / "run", "data.params.texts=null", objective)
    conds: list[Cond] = []

    def sample(model: Any, cond: Cond, uncond: Cond, **_: Any) -> torch.Tensor:
        conds.extend((cond, uncond))
        return torch.zeros(1, 4, 8, 8)

    monkeypatch.setattr("ldm.train.monitoring.samples.sample", sample)
    sample_images(run, run.model, run.source.load_fixed_samples(1))
    (cond, uncond), pooled_dim = [value.vector for value in conds], 40
    assert not uncond[:, :pooled_dim].any()
    assert uncond[:, pooled_dim:].equal(cond[:, pooled_dim:]) == (not legacy)
    assert uncond[:, pooled_dim:].any() == (not legacy)


@pytest.mark.parametrize(
    ("family", "components", "overrides"),
    [
        ("xl", {"unet", "te1", "te2"}, []),
        pytest.param("xl-refiner", {"unet", "te"}, [], marks=pytest.mark.slow),
        pytest.param("xl-inpainting", {"unet", "te1", "te2"}, [MASKS], marks=pytest.mark.slow),
    ],
)
def test_a_lora_and_an_embedding_of_all_text_encoders_are_trained_and_loaded(
    family: str, components: set[str], overrides: list[str], photos: Path, tmp_path: Path
) -> None:
    run = make_run(
        family,
        photos,
        tmp_path / "run",
        "data.params.texts=null",
        "data.params.train.fields.text=a <thing>",
        "lightning.lora={rank: 2, targets: [attention, text]}",
        "lightning.textual_inversion={token: <thing>, num_vectors: 3, initializer_words: cat}",
        "lightning.callbacks.max_images=0",
        *overrides,
    )
    train(run)
    trained = dict(run.state.ema.shadow)
    vectors = [value for name, value in trained.items() if name.startswith("word.")]
    encoders = run.model.conditioner.find_all(TextEncoder)
    for encoder, value in zip(encoders, vectors, strict=True):
        assert len(value) == 3
        assert (value - encoder.get_token_embeddings("cat")).abs().max() > 0

    write_family(family, tmp_path / "model.safetensors")
    model = ldm.load(None, tmp_path / "model.safetensors")
    load_embeddings(model, [run.checkpoints / "last-word.safetensors"])
    for encoder, value in zip(model.conditioner.find_all(TextEncoder), vectors, strict=True):
        assert torch.equal(next(iter(encoder.added_embeddings.values())), value)
    for style in ("last", "last-diffusers"):
        lora: Any = read_lora(run.checkpoints / f"{style}.safetensors", model)
        names = {f"lora.{name}" for name, _ in lora.named_parameters()}
        assert names == {name for name in trained if name.startswith("lora.")}
        assert {name.split("_")[1] for name in lora} == components


def list_prior_overrides(folder: Path) -> list[str]:
    prior = f"{{root: {folder}, prompt: a dog, count: 2, transform: {{name: photo, size: 64}}}}"
    return ["data.params.train.transform.buckets=null", f"data.params.prior={prior}"]


@pytest.mark.slow
def test_dreambooth_samples_missing_class_images(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    overrides = [*list_prior_overrides(folder), "lightning.callbacks.max_images=0"]
    config = make_config("xl", photos, tmp_path / "run", *overrides)
    config["model"]["params"]["image_size"] = 8
    run = build_run_from(config, tmp_path / "run")
    assert len(list(folder.glob("*.png"))) == 2
    source: Any = run.source
    prior_sample = source.dataset[0, 0]["prior"]
    assert prior_sample["txt"] == "a dog"
    assert prior_sample["target_size_as_tuple"].tolist() == [64, 64]
    train(run)
    assert "prior" in (run.folder / "log.csv").read_text().splitlines()[0].split(",")


def test_a_refiner_requests_missing_class_images(photos: Path, tmp_path: Path) -> None:
    overrides = list_prior_overrides(tmp_path / "class")
    with pytest.raises(ArgumentError, match="2 class images are missing in .*: put class images"):
        make_run("xl-refiner", photos, tmp_path / "run", *overrides)


def test_a_training_config_of_generative_models_is_run(photos: Path, tmp_path: Path) -> None:
    """Without `lightning.optimizer`, it is trained as by the original."""
    config = make_config("xl-v", photos, tmp_path / "run", "data.params.texts=null")
    embedders = config["model"]["params"]["conditioner_config"]["params"]["emb_models"]
    for embedder in embedders:
        embedder["ucg_rate"] = 0.5
    embedders[0]["legacy_ucg_value"] = ""
    package = "sgm.modules.diffusionmodules."
    config["model"]["params"]["loss_fn_config"] = {
        "target": f"{package}loss.StandardDiffusionLoss",
        "params": {
            "loss_weighting_config": {"target": f"{package}loss_weighting.VWeighting"},
            "sigma_sampler_config": {"target": f"{package}sigma_sampling.EDMSampling"},
        },
    }
    config["lightning"] = {"trainer": {"max_steps": 1, "check_initial_loss": False}}
    config["lightning"]["callbacks"] = {"max_images": 0, "loggers": ["csv"]}
    run = build_run_from(config, tmp_path / "run")
    assert isinstance(run.task, DiffusionTask)
    assert (run.task.conditioning_dropout_prob, run.task.sigma_distribution) == (None, LogNormal())
    assert run.state.ema.decay == 0
    train(run)
    assert run.state.skipped_steps == 0
