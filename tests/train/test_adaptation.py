"""LoRA, textual inversion and DreamBooth: little is trained, and scripts can use what was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldm
from ldm.data.dataset import WithClassImages
from ldm.data.folder import Folder
from ldm.data.source import collate
from ldm.data.transforms import PhotoTransform
from ldm.loading.addons.embeddings import load_embeddings
from ldm.loading.addons.lora import read_lora
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml, read_yaml
from ldm.loading.legacy import translate_config
from ldm.train.batches.class_images import make_pictures
from ldm.train.config.settings import read_settings
from ldm.train.loop import Run
from ldm.train.tasks.adaptation import Adaptation
from ldm.train.tasks.diffusion import Diffusion

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/train/tiny.yaml"
DATA = f"data.params.train.root={ROOT / 'tests/data/emoji'}"
SHORT = ["lightning.trainer.max_steps=2", "lightning.callbacks.images=1"]
SHORT += ["lightning.trainer.sanity=false"]  # what they start from has learned nothing
LORA = ["lightning.lora.rank=4", "lightning.lora.targets=[attention, text]"]
WORD = ["lightning.textual_inversion.token=<Thing>", "lightning.textual_inversion.vectors=3"]
WORD += ["data.params.train.fields.object=a <thing>", "data.params.train.transform.keyword=0"]
WORD += ["data.params.train.transform.drop_object=0", "lightning.objective.drop=0"]


def tiny(folder: Path, *overrides: str) -> Run:
    raw = read_yaml(TINY, [DATA, *SHORT, *overrides])
    return Run(read_settings(raw), folder, text=format_yaml(raw))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model, which adaptations start from."""
    run = tiny(tmp_path_factory.mktemp("base"), "lightning.optimizer.ema_decay=0")
    run.train()
    return run.last


def adapted(folder: Path, base: Path, *overrides: str) -> Run:
    return tiny(folder, f"model.params.ckpt_path={base}", *overrides)


def test_a_lora_is_trained_beside_a_frozen_model_and_used(base: Path, tmp_path: Path) -> None:
    run = adapted(tmp_path / "lora", base, *LORA)
    frozen = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    assert all(torch.equal(value, frozen[name]) for name, value in run.model.state_dict().items())
    model: Any = ldm.load(None, base)
    for style in ("last", "last-diffusers"):
        adapter: Any = read_lora(run.last.with_name(f"{style}.safetensors"), model)
        trained = dict(run.state.ema.shadow)
        assert {f"lora.{name}" for name, _ in adapter.named_parameters()} == trained.keys()
        for name, value in adapter.named_parameters():
            torch.testing.assert_close(value, trained[f"lora.{name}"], rtol=0, atol=0)
    assert any("_te_" in name for name in adapter)
    assert all("attn" in name or "_te_" in name for name in adapter)
    assert any(low.delta().abs().max() > 0 for low in adapter.values())


def test_a_word_is_learned_and_used(base: Path, tmp_path: Path) -> None:
    run = adapted(tmp_path / "word", base, *WORD, "lightning.textual_inversion.init=a cat")
    text: Any = run.model.conditioner.text
    start = text.token_embeddings("a cat")
    assert torch.equal(text.added_embeddings["<thing>"], start[[0, 1, 0]])
    run.train()
    model: Any = ldm.load(None, base)
    load_embeddings(model, [run.last])
    vectors = model.conditioner.text.added_embeddings["<thing>"]
    assert torch.equal(vectors, run.state.ema.shadow["word.vectors"])
    assert (vectors - start[[0, 1, 0]]).abs().max() > 0
    assert (text.tokenize(["a <thing>"]) < 0).sum() == 3


def test_both_at_once_are_two_files_and_go_on_where_they_ended(base: Path, tmp_path: Path) -> None:
    whole = adapted(tmp_path / "whole", base, *LORA, *WORD)
    whole.train()
    first = adapted(tmp_path / "parts", base, *LORA, *WORD, "lightning.trainer.max_steps=1")
    first.train()
    second = adapted(tmp_path / "parts", base, *LORA, *WORD)
    second.resume()
    second.train()
    names = sorted(path.name for path in second.last.parent.glob("*.*"))
    assert names == ["last-diffusers.safetensors", "last-word.safetensors", "last.safetensors"]
    for name, value in whole.task.trained.state_dict().items():
        assert torch.equal(second.task.trained.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lightning.lora.ranks=4"], "lightning.lora: unknown key `ranks`, did you mean `rank`"),
        (["lightning.lora.targets=[texts]"], "targets: `texts` should be one of attention"),
        (["lightning.textual_inversion.tokens=x"], "unknown key `tokens`, did you mean `token`"),
        ([*WORD, "lightning.textual_inversion.init=a qwertyuiop"], "vocabulary lacks `qwertyuiop`"),
        ([*WORD, "lightning.textual_inversion.init='&#7;'"], "has no words"),
        (["lightning.textual_inversion.token=<x>"], "no caption has the word `<x>`, one is `"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, *overrides).train()


@pytest.mark.parametrize(
    ("base", "recipe", "parts"),
    [
        ("demo/text2img", "lora", {"lora"}),
        ("demo/text2img", "textual-inversion", {"word"}),
        ("stable-diffusion/v1-inference", "lora-photos", {"lora"}),
        ("stable-diffusion/v2-inference-v", "lora-photos", {"lora"}),
    ],
)
def test_the_recipes_fit_the_models(base: str, recipe: str, parts: set[str]) -> None:
    raw = read_yaml(f"configs/{base}.yaml", (), f"configs/train/{recipe}.yaml")
    model: Any = build_on_meta(translate_config(raw))
    settings = raw["lightning"]
    little = (settings.get("lora"), settings.get("textual_inversion"))
    task = Adaptation(Diffusion(model, **settings["objective"]), *little)
    assert task.trained.keys() == parts
    if recipe == "lora-photos":
        assert len(task.trained["lora"]) == 192


def test_pictures_of_a_class_are_made_where_they_lack(base: Path, tmp_path: Path) -> None:
    model, folder = ldm.load(None, base), tmp_path / "class"
    make_pictures(model, folder, "a cat", 2, steps=1, batch=2)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(made) == ["00000.png", "00001.png"]
    make_pictures(model, folder, "a cat", 3, steps=1, batch=2)
    assert len(list(folder.iterdir())) == 3
    assert all((folder / name).read_bytes() == content for name, content in made.items())


def test_the_prior_is_added_to_the_loss(base: Path, tmp_path: Path) -> None:
    prior = [f"data.params.prior.root={tmp_path / 'class'}", "data.params.prior.count=3"]
    prior += ["data.params.prior.prompt=a dog", "data.params.prior.transform.name=photo"]
    prior += ["data.params.prior.transform.size=32", "lightning.objective.prior_weight=0.5"]
    run = adapted(tmp_path / "run", base, *prior)
    source: Any = run.source
    batch = collate([source.dataset[0, index] for index in range(4)])
    assert batch["prior"]["txt"] == ["a dog"] * 4
    assert batch["prior"]["jpg"].shape == batch["jpg"].shape == (4, 3, 32, 32)
    losses = run.task.loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses["loss"], losses["instance"] + 0.5 * losses["prior"])
    own = {key: value for key, value in batch.items() if key != "prior"}
    alone = run.task.loss(own, torch.Generator().manual_seed(0))
    assert torch.equal(alone["loss"], losses["instance"])
    run.train()
    assert run.last.exists()


def test_folders_without_metadata_are_listed_with_their_texts(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "1.png", ".3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 8)).save(tmp_path / name)
    (tmp_path / "1.txt").write_text("a red fox\n")
    folder = Folder(root=tmp_path, transform=PhotoTransform(size=8))
    assert [folder[0, k]["txt"] for k in range(2)] == ["a red fox", ""]
    same = Folder(root=tmp_path, transform=PhotoTransform(size=8), fields={"text": "sks"})
    assert [same[0, k]["txt"] for k in range(len(same))] == ["sks", "sks"]
    one = Folder(root=tmp_path, transform=PhotoTransform(size=8), where={"text": "a red fox"})
    assert len(one) == 1
    with pytest.raises(ValueError, match="has no images with text `x`, split `train`"):
        Folder(root=tmp_path, transform=PhotoTransform(), where={"text": "x"}, split="train")
    pairs = WithClassImages(one, same)
    assert [pairs[epoch, 0]["prior"]["jpg"].shape for epoch in range(3)] == [(3, 8, 8)] * 3
