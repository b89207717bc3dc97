"""What is seen of a run: logs, grids, validation, the loss per timestep, and what is exported."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.loading.config import format_yaml, parse_yaml, read_yaml
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.load import load
from ldm.train.config.settings import read_settings
from ldm.train.distributed.parallel import Ranks
from ldm.train.loop import Run
from ldm.train.monitoring import samples
from ldm.train.monitoring.cadence import Every
from ldm.train.monitoring.logs import Csv, Loggers, Progress
from ldm.train.monitoring.timesteps import TimestepLog
from ldm.train.monitoring.validation import validate
from ldm.train.runs import exports

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/train/tiny.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Run:
    """Two steps of the tiny model, with pictures held out."""
    root, folder = ROOT / "tests/data/emoji", tmp_path_factory.mktemp("run")
    held_out = f"{{root: {root}, split: heldout, transform: {{name: emoji, size: 32}}}}"
    overrides = [f"data.params.train.root={root}", f"data.params.validation={held_out}"]
    overrides += ["data.params.batch_size=2", "lightning.callbacks.sampling={steps: 2}"]
    raw = read_yaml(TINY, overrides)
    made = Run(read_settings(raw), folder, text=format_yaml(raw))
    batches = made.source.batches(2)
    for number in range(2):
        made.step([(number, next(batches))], 1e-3)
    return made


def change(run: Run, monkeypatch: pytest.MonkeyPatch, **callbacks: Any) -> None:
    """Other settings of a run, until the test is over."""
    monkeypatch.setattr(run, "settings", run.settings.change(callbacks=callbacks))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_gets_columns_when_they_come(tmp_path: Path) -> None:
    table = Csv(tmp_path / "log.csv")
    table.scalars(1, {"loss": 0.5})
    table.scalars(2, {"loss": 0.25, "val/loss": 1.0})
    table.scalars(3, {"val/loss": 2.0})
    assert [list(row.values()) for row in rows(tmp_path / "log.csv")] == [
        ["1", "0.5", ""],
        ["2", "0.25", "1"],
        ["3", "", "2"],
    ]


def test_rows_after_the_state_are_dropped_as_they_come_again(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    table = Csv(path)
    for step in (1, 2, 3):
        table.scalars(step, {"loss": step})
    with path.open("a") as file:
        file.write("4,1")  # the process died here
    again = Csv(path, start=2)
    again.scalars(3, {"loss": 30})
    assert [row["loss"] for row in rows(path)] == ["1", "2", "30"]


def test_a_line_of_the_log_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    loggers = Loggers(tmp_path, ["csv"])
    progress = Progress(loggers, Ranks(), torch.device("cpu"), start=3, steps=8, every=4)
    for step, loss in enumerate((7.0, 1.0, 2.0, 3.0, 6.0), start=4):
        losses = {"loss": torch.tensor(loss), "losses": torch.ones(2)}
        progress(step, losses, 1e-3, images=2)
    progress.close()
    first, second = rows(tmp_path / "log.csv")
    assert (first["step"], first["loss"]) == ("4", "7")
    assert (second["step"], second["loss"], second["lr"]) == ("8", "3", "0.001")
    assert 0.05 < float(second["memory_gib"]) < 100


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = Loggers(tmp_path, ["tensorboard"])
    loggers.scalars(5, {"loss": 0.5})
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    loggers.image(5, "samples", tmp_path / "a.png")
    loggers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 0.5
    assert (events.Images("samples")[0].width, events.Images("samples")[0].step) == (4, 5)


def test_wandb_gets_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    told: list[Any] = []

    class Handle:
        def log(self, values: Any, step: int) -> None:
            told.append((values, step))

        def finish(self) -> None:
            told.append("finished")

    stand_in = ModuleType("wandb")
    stand_in.Image = lambda path: f"image {path}"  # type: ignore[attr-defined]
    stand_in.init = lambda **options: told.append(options) or Handle()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    loggers = Loggers(tmp_path, ["wandb"], wandb={"project": "p"}, config={"a": 1})
    loggers.scalars(1, {"loss": 2.0})
    loggers.image(1, "samples", Path("a.png"))
    loggers.close()
    assert told[0]["project"] == "p"
    assert (told[0]["config"], told[0]["id"]) == ({"a": 1}, tmp_path.name)
    assert told[1:] == [({"loss": 2.0}, 1), ({"samples": "image a.png"}, 1), "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-revived\[wandb\]'"):
        Loggers(tmp_path, ["wandb"])


def test_a_log_without_its_package_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert len(Loggers(tmp_path, ["csv", "tensorboard"]).logs) == 1


def test_pictures_come_early_and_then_in_turn() -> None:
    every = Every(steps=10, early=True)
    assert [step for step in range(1, 31) if every(step)] == [1, 2, 4, 8, 10, 16, 20, 30]
    never = Every()
    assert not any(never(step) for step in range(1, 100))


def test_the_best_weights_stay(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "folder", tmp_path)
    change(run, monkeypatch, export=["safetensors", "ckpt"])

    def kept(**options: Any) -> list[str]:
        """What is there after five validations, by the losses in the names."""
        change(run, monkeypatch, **options)
        for step, loss in enumerate((0.5, 0.3, 0.4, math.nan, 0.1)):
            monkeypatch.setattr(run.state, "step", step)
            exports.export_best(run, {"val/loss": 1 - loss, "val/loss_ema": loss})
        files = sorted((tmp_path / "checkpoints").glob("*"))
        assert all(path.stat().st_size > 1e6 for path in files)
        names = [path.name.rpartition("=")[2] for path in files]
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        return names

    assert kept(best=0) == []
    both = [
        f"{loss}.{kind}" for loss in ("0.300000", "0.100000") for kind in ("ckpt", "safetensors")
    ]
    assert kept(best=2) == both
    assert len(kept(best=-1)) == 8
    assert [name[:8] for name in kept(best=1, monitor="val/loss")] == ["0.500000"] * 2
    with pytest.raises(ValueError, match="monitor: `val/psnr` is none of val/loss, val/loss_ema"):
        kept(monitor="val/psnr")


def test_validation_is_the_same_every_time_and_leaves_no_trace(run: Run) -> None:
    run.task.trained.train()
    modes = [part.training for part in run.model.modules()]
    first = validate(run)
    torch.manual_seed(99)
    assert validate(run) == first
    assert [part.training for part in run.model.modules()] == modes
    assert set(first) >= {"val/loss", "val/loss_ema", "val/loss_simple_ema"}
    assert first["val/loss"] != first["val/loss_ema"]


def test_grids_show_both_weights_at_fixed_prompts(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(run, monkeypatch, images=2, prompts=["a red cat"])
    train, val = samples.draw(run)
    assert train == run.folder / "images/train/samples_gs-000002_e-000000_b-000002.png"
    assert val.parent.name == "val"
    assert train.with_suffix(".txt").read_text() == "a red cat\na red cat\n"
    first = train.read_bytes()
    assert samples.draw(run)[0].read_bytes() == first
    change(run, monkeypatch, images=0)
    assert samples.draw(run) == []


def test_a_checkpoint_of_a_step_has_its_number(run: Run) -> None:
    (path,) = exports.export_step(run)
    folder = run.folder / "checkpoints/trainstep_checkpoints"
    assert path == folder / "epoch=000000-step=000000002.safetensors"
    assert path.exists()


def test_the_loss_is_kept_by_timestep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = TimestepLog(tmp_path, Ranks(), 1000, bins=4)
    log.add(torch.tensor([0, 249, 250, 999]), torch.tensor([1.0, 3.0, 5.0, float("nan")]))
    plot = log.write(10)
    assert plot is not None
    with Image.open(plot) as picture:
        assert picture.size == (770, 440)
    found = rows(tmp_path / "timesteps.csv")
    assert [tuple(row.values()) for row in found] == [
        ("10", "0", "249", "2", "2"),
        ("10", "250", "499", "5", "1"),
    ]
    log.add(torch.tensor([100, 100]), torch.tensor([8.0, 8.0]))
    log.write(20)  # what was seen before counts half
    assert rows(tmp_path / "timesteps.csv")[2]["loss"] == "6"
    assert sorted(TimestepLog(tmp_path, Ranks(), 1000, bins=4, start=10).curves) == [10]
    assert [row["step"] for row in rows(tmp_path / "timesteps.csv")] == ["10", "10"]


@pytest.mark.parametrize("weights", ["ema", "raw", "both"])
def test_an_export_has_the_weights_that_are_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    change(run, monkeypatch, weights=weights, export=["safetensors", "ckpt"], dtype="full")
    name = "unet.out.2.weight"
    raw, mean = run.model.state_dict()[name].clone(), run.state.ema.shadow[name]
    assert not raw.equal(mean)
    for path in exports.export(run, tmp_path / "last"):
        model: Any = load(None, path)
        assert model.state_dict()[name].equal(mean if weights == "ema" else raw)
        file = read_checkpoint(path)
        assert (file.has_ema, file.step) == (weights == "both", 2)
        assert file.metadata["modelspec.prediction_type"] == "v"
        assert json.loads(file.metadata["ldm.training"])["seed"] == 23
        if weights == "both":
            averaged: Any = load(None, path, ema=True)
            assert averaged.state_dict()[name].equal(mean)
            assert float(file.averages["model_ema.decay"]) == pytest.approx(0.9)
            assert int(file.averages["model_ema.num_updates"]) == 2
            assert "model_ema.diffusion_modelout2weight" in file.averages
        assert "model.diffusion_model.out.2.weight" in file.state
        assert file.state["alphas_cumprod"].dtype == torch.float32


def test_half_an_export_is_half_as_large(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(run, monkeypatch, weights="both", export=["safetensors"], dtype="half")
    (path,) = exports.export(run, tmp_path / "last")
    file = read_checkpoint(path)
    assert file.state["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert file.averages["model_ema.decay"].dtype == torch.float32


def test_what_is_small_says_what_it_was_trained_with(tmp_path: Path) -> None:
    words = [f"data.params.train.root={ROOT}/tests/data/emoji", "lightning.lora.rank=2"]
    raw = read_yaml(TINY, [*words, "lightning.textual_inversion.token=emoji"])
    run = Run(read_settings(raw), tmp_path, text=format_yaml(raw))
    exports.export(run, tmp_path / "last")
    for name in ("last", "last-diffusers", "last-word"):
        notes = read_checkpoint(tmp_path / f"{name}.safetensors").metadata
        assert parse_yaml(notes["ldm.training.config"])["lightning"]["lora"] == {"rank": 2}
        assert json.loads(notes["ldm.training"])["seed"] == 23
        assert "ldm.config" not in notes  # it is no model
