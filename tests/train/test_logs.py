"""Logs of a run: CSV, TensorBoard, W&B, losses by timestep, and triggers."""

import csv
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.train.distributed.parallel import Ranks
from ldm.train.monitoring import timers
from ldm.train.monitoring.logs import CsvLogger, LoggerCollection, ProgressBar
from ldm.train.monitoring.timers import Trigger
from ldm.train.monitoring.timestep_losses import TimestepLosses


def read_rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def test_a_csv_log_gets_a_column_when_its_value_appears(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "log.csv")
    logger.log_scalars(1, {"loss": 0.5})
    logger.log_scalars(2, {"loss": 0.25, "val/loss": 1.0})
    logger.log_scalars(3, {"val/loss": 2.0})
    assert read_rows(tmp_path / "log.csv") == [["1", "0.5", ""], ["2", "0.25", "1"], ["3", "", "2"]]


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    logger = CsvLogger(path)
    for step in (1, 2, 3):
        logger.log_scalars(step, {"loss": step})
    with path.open("a") as file:
        file.write("4,1")  # the process was killed here
    CsvLogger(path, start_step=2).log_scalars(3, {"loss": 30})
    assert read_rows(path) == [["1", "1"], ["2", "2"], ["3", "30"]]


def test_a_row_of_the_log_has_the_mean_since_the_last_row(tmp_path: Path) -> None:
    loggers = LoggerCollection(tmp_path, ["csv"])
    options = {"start_step": 3, "max_steps": 8, "log_steps": 4}
    progress = ProgressBar(loggers, Ranks(), torch.device("cpu"), **options)
    for step, loss in enumerate((7.0, 1.0, 2.0, 3.0, 6.0), start=4):
        losses = {"loss": torch.tensor(loss), "loss_per_sample": torch.ones(2)}
        progress.update(step, losses, 1e-3, num_images=2)
    progress.close()
    first, second = read_rows(tmp_path / "log.csv")  # step, loss, lr, images per second, memory
    assert first[:3] == ["4", "7", "0.001"]
    assert second[:3] == ["8", "3", "0.001"]
    assert 0.05 < float(second[4]) < 100


def test_tensorboard_gets_numbers_and_images(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = LoggerCollection(tmp_path, ["tensorboard"])
    loggers.log_scalars(5, {"loss": 0.5})
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    loggers.log_image(5, "samples", tmp_path / "a.png")
    loggers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 0.5
    assert (events.Images("samples")[0].width, events.Images("samples")[0].step) == (4, 5)


def test_wandb_gets_numbers_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Handle:
        def log(self, values: Any, step: int) -> None:
            calls.append((values, step))

        def finish(self) -> None:
            calls.append("finished")

    wandb: Any = ModuleType("wandb")
    wandb.Image = lambda path: f"image {path}"
    wandb.init = lambda **options: calls.append(options) or Handle()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    loggers = LoggerCollection(tmp_path, ["wandb"], wandb={"project": "p"}, config={"a": 1})
    loggers.log_scalars(1, {"loss": 2.0})
    loggers.log_image(1, "samples", Path("a.png"))
    loggers.close()
    options = {"project": "p", "config": {"a": 1}, "id": tmp_path.name}
    assert options.items() <= calls[0].items()
    assert calls[1:] == [({"loss": 2.0}, 1), ({"samples": "image a.png"}, 1), "finished"]


def test_a_missing_package_is_an_error_for_wandb_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert len(LoggerCollection(tmp_path, ["csv", "tensorboard"]).loggers) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-revived\[wandb\]'"):
        LoggerCollection(tmp_path, ["wandb"])


def test_a_trigger_is_due_at_first_steps_and_at_intervals() -> None:
    trigger, never = Trigger(steps=10, early=True), Trigger()
    assert [n for n in range(1, 31) if trigger.is_due(n)] == [1, 2, 4, 8, 10, 16, 20, 30]
    assert not any(never.is_due(step) for step in range(1, 100))


@pytest.fixture
def no_plots() -> None:
    """Overrides the fixture that switches plots off."""


def test_the_loss_is_logged_by_timestep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "timesteps.csv"
    log = TimestepLosses(tmp_path, Ranks(), 1000, num_bins=4)
    log.add(torch.tensor([0, 249, 250, 999]), torch.tensor([1.0, 3.0, 5.0, float("nan")]))
    plot = log.write(10)
    assert plot is not None
    with Image.open(plot) as image:
        assert image.size == (770, 440)
    expected = [["10", "0", "249", "2", "2"], ["10", "250", "499", "5", "1"]]
    assert read_rows(path) == expected
    log.add(torch.tensor([100, 100]), torch.tensor([8.0, 8.0]))
    log.write(20)  # earlier losses count half
    assert read_rows(path)[2][3] == "6"
    assert sorted(TimestepLosses(tmp_path, Ranks(), 1000, num_bins=4, start_step=10).curves) == [10]
    assert read_rows(path) == expected


def test_the_step_timer_ignores_suspended_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timers.time, "monotonic", lambda: now[0])
    timer = timers.StepTimer()
    durations = []
    for seconds in (5, 1, 1, 1, 1, 1, 3600, 1):
        now[0] += seconds
        durations.append(timer.stop())
    assert durations == [5, 1, 1, 1, 1, 1, 10, 1]
    now[0] += 100
    timer.start()
    assert timer.stop() == 0
