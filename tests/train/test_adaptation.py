"""LoRA, textual inversion and DreamBooth: trained, exported and loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldm
from ldm.data.folder import ImageFolder
from ldm.data.source import collate
from ldm.data.transforms import PhotoTransform
from ldm.loading.addons.embeddings import load_embeddings
from ldm.loading.build import build_on_meta
from ldm.loading.config import parse_yaml, read_config_text
from ldm.train.batches.class_images import sample_class_images
from ldm.train.build import build_task
from ldm.train.config.settings import read_settings
from ldm.train.loop import train
from ldm.train.monitoring.validation import validate
from ldm.train.run import Run
from loading.lorahelp import read_lora
from train.tinyrun import build_tiny_run, resume_newest

# The check of the initial loss would refuse the base model, which is not trained.
INITIALIZER_WORDS = "lightning.textual_inversion.initializer_words"
SHORT_RUN = ("lightning.trainer.max_steps=2", "lightning.trainer.check_initial_loss=false")
LORA = ["lightning.lora.rank=4", "lightning.lora.targets=[attention, text]"]
TEXTUAL_INVERSION = [
    "lightning.textual_inversion.token=<Thing>", "lightning.textual_inversion.num_vectors=3",
    "data.params.train.fields.object=a <thing>", "data.params.train.transform.keyword=0",
    "data.params.train.transform.drop_object=0", "lightning.objective.conditioning_dropout_prob=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model, from which LoRAs and embeddings are trained."""
    run = build_tiny_run(
        tmp_path_factory.mktemp("base"), *SHORT_RUN, "lightning.optimizer.ema_decay=0"
    )
    train(run)
    return run.checkpoints / "last.safetensors"


def build_adapter_run(folder: Path, base: Path, *overrides: str) -> Run:
    return build_tiny_run(folder, *SHORT_RUN, f"model.params.ckpt_path={base}", *overrides)


@pytest.mark.usefixtures("no_states")
def test_a_lora_is_trained_exported_and_loaded(base: Path, tmp_path: Path) -> None:
    run = build_adapter_run(tmp_path / "lora", base, *LORA)
    frozen = {name: value.clone() for name, value in run.model.state_dict().items()}
    train(run)
    assert all(torch.equal(value, frozen[name]) for name, value in run.model.state_dict().items())
    model: Any = ldm.load(None, base)
    for path in (".", "checkpoints/last.safetensors", "checkpoints/last-diffusers.safetensors"):
        lora: Any = read_lora(run.folder / path, model)
        trained = dict(run.state.ema.shadow)
        assert {f"lora.{name}" for name, _ in lora.named_parameters()} == trained.keys()
        for name, value in lora.named_parameters():
            torch.testing.assert_close(value, trained[f"lora.{name}"], rtol=0, atol=0)
    assert any("_te_" in name for name in lora)
    assert all("attn" in name or "_te_" in name for name in lora)
    assert any(layer.compute_delta().abs().max() > 0 for layer in lora.values())


@pytest.mark.usefixtures("no_states")
def test_an_embedding_is_trained_exported_and_loaded(base: Path, tmp_path: Path) -> None:
    run = build_adapter_run(
        tmp_path / "word", base, *TEXTUAL_INVERSION, INITIALIZER_WORDS + "=a cat"
    )
    text: Any = run.model.conditioner.text
    initial = text.get_token_embeddings("a cat")
    assert torch.equal(text.added_embeddings["<thing>"], initial[[0, 1, 0]])
    train(run)
    model: Any = ldm.load(None, base)
    load_embeddings(model, [run.checkpoints / "last.safetensors"])
    vectors = model.conditioner.text.added_embeddings["<thing>"]
    assert torch.equal(vectors, run.state.ema.shadow["word.vectors"])
    assert (vectors - initial[[0, 1, 0]]).abs().max() > 0
    assert (text.tokenize(["a <thing>"]) < 0).sum() == 3


def test_a_state_of_a_larger_lora_is_refused(base: Path, tmp_path: Path) -> None:
    run = build_adapter_run(tmp_path / "large", base, *LORA)
    run.states.save(run.state)
    smaller = build_adapter_run(
        tmp_path / "small", base, *LORA, "lightning.lora.targets=[attention]"
    )
    with pytest.raises(ValueError, match=r"another model or optimizer: `average\.lora\.lora_te_"):
        resume_newest(smaller, run.folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lightning.lora.ranks=4"], "lightning.lora: unknown key `ranks`, did you mean `rank`"),
        (["lightning.lora.targets=[texts]"], "targets: `texts` should be one of attention"),
        (["lightning.textual_inversion.tokens=x"], "unknown key `tokens`, did you mean `token`"),
        ([*TEXTUAL_INVERSION, INITIALIZER_WORDS + "=a qwertyuiop"],
         "not in the model's vocabulary: `qwertyuiop`"),
        ([*TEXTUAL_INVERSION, INITIALIZER_WORDS + "='&#7;'"], "has no words"),
        (["lightning.textual_inversion.token=<x>"], "token `<x>` appears in no caption"),
    ],
)  # fmt: skip
def test_invalid_settings_are_named(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(build_tiny_run(tmp_path, *SHORT_RUN, *overrides))


@pytest.mark.parametrize(
    ("model", "recipe", "trained"),
    [
        ("demo/text2img", "lora", {"lora"}),
        ("demo/text2img", "textual-inversion", {"word"}),
        ("stable-diffusion/v1-inference", "lora-photos", {"lora"}),
        pytest.param(
            "stable-diffusion/v2-inference-v", "lora-photos", {"lora"}, marks=pytest.mark.slow
        ),
        pytest.param("stable-diffusion-xl/sd_xl_base", "lora-xl", {"lora"}, marks=pytest.mark.slow),
        ("stable-diffusion-xl/sd_xl_refiner", "textual-inversion-xl", {"word"}),
    ],
)
def test_recipes_fit_their_models(model: str, recipe: str, trained: set[str]) -> None:
    paths = (f"configs/{model}.yaml", f"configs/train/{recipe}.yaml")
    config = parse_yaml([read_config_text(path) for path in paths])
    task: Any = build_task(build_on_meta(config), read_settings(config))
    assert task.trainable.keys() == trained
    if "lora" in trained and model != "demo/text2img":
        assert len(task.trainable["lora"]) == (722 if recipe == "lora-xl" else 192)


def test_missing_class_images_are_sampled(base: Path, tmp_path: Path) -> None:
    model, folder = ldm.load(None, base), tmp_path / "class"
    sample_class_images(model, folder, "a cat", 2, steps=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["00000.png", "00001.png"]
    sample_class_images(model, folder, "a cat", 3, steps=1)
    assert len(list(folder.iterdir())) == 3
    assert all((folder / name).read_bytes() == content for name, content in before.items())


def test_the_loss_of_class_images_is_added(base: Path, tmp_path: Path) -> None:
    prior = [f"data.params.prior.root={tmp_path / 'class'}", "data.params.prior.count=3"]
    prior += ["data.params.prior.prompt=a dog", "data.params.prior.transform.name=photo"]
    prior += ["data.params.prior.transform.size=32", "lightning.objective.prior_loss_weight=0.5"]
    run = build_adapter_run(tmp_path / "run", base, *prior)
    source: Any = run.source
    batch = collate([source.dataset[0, index] for index in range(4)])
    assert batch["prior"]["txt"] == ["a dog"] * 4
    assert batch["prior"]["jpg"].shape == batch["jpg"].shape == (4, 3, 32, 32)
    losses = run.task.loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses["loss"], losses["instance"] + 0.5 * losses["prior"])
    del batch["prior"]
    without_prior = run.task.loss(batch, torch.Generator().manual_seed(0))
    assert torch.equal(without_prior["loss"], losses["instance"])


def test_captions_of_validation_need_not_have_the_token(base: Path, tmp_path: Path) -> None:
    run = build_adapter_run(tmp_path, base, "lightning.textual_inversion.token=<x>")
    assert validate(replace(run, validation_source=run.source), num_batches=1)["val/loss"] > 0


def test_images_are_selected_by_caption(tmp_path: Path) -> None:
    for name in ("a red fox", "a dog"):
        Image.new("RGB", (9, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    foxes = ImageFolder(
        root=tmp_path, transform=PhotoTransform(size=8), where={"text": "a red fox"}
    )
    assert [foxes[0, k]["txt"] for k in range(len(foxes))] == ["a red fox"]
    with pytest.raises(ValueError, match="has no images with text `x`, split `train`"):
        ImageFolder(root=tmp_path, transform=PhotoTransform(), where={"text": "x"}, split="train")
