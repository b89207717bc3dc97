"""The training loop: it learns, it stops, it goes on exactly, and what it writes can be loaded."""

import csv
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.loading.config import read_yaml
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.load import load
from ldm.train.config.schema import parse_duration
from ldm.train.config.settings import read_settings
from ldm.train.loop import Run

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/train/tiny.yaml"


def tiny(folder: Path, *overrides: str) -> Run:
    data = f"data.params.train.root={ROOT / 'tests/data/emoji'}"
    return Run(read_settings(read_yaml(TINY, [data, *overrides])), folder, text=TINY.read_text())


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {**run.task.trained.state_dict(), **run.state.ema.shadow}


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    generator = torch.Generator()
    batch = {"z": torch.randn(2, 4, 8, 8), "txt": ["cat", "dog"]}
    run.task.drop = 0.0
    losses = []
    optimizer = run.state.players["model"].optimizer
    for group in optimizer.param_groups:
        group["lr"] = 2e-3
    for _ in range(40):
        generator.manual_seed(0)
        loss = run.task.loss(batch, generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "whole", "lightning.trainer.max_steps=6")
    whole.train()
    first = tiny(tmp_path / "parts", "lightning.trainer.max_steps=3")
    first.train()
    second = tiny(tmp_path / "parts", "lightning.trainer.max_steps=6")
    second.resume()
    second.train()
    assert second.state.step == 6
    for name, value in weights(whole).items():
        assert torch.equal(weights(second)[name], value), name


def test_gradients_add_up_over_parts_of_a_batch(tmp_path: Path) -> None:
    run = tiny(tmp_path, "lightning.trainer.accumulate_grad_batches=2")
    work = [(n, {"z": torch.randn(2, 4, 8, 8), "txt": ["a", "b"]}) for n in range(2)]
    run.step(work, 1e-3)
    assert (run.state.step, run.state.position) == (1, 2)


def test_what_a_run_exports_makes_pictures(tmp_path: Path) -> None:
    run = tiny(tmp_path, "lightning.trainer.max_steps=2")
    run.train()
    model: Any = load(None, run.last)
    shadow = run.state.ema.shadow["unet.out.2.weight"]
    torch.testing.assert_close(model.unet.out[2].weight, shadow, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "images/train/samples_gs-000002_e-000000_b-000002.png").exists()
    assert model.conditioner.text.token_ids.max() >= 49407


def test_a_signal_ends_the_run_and_keeps_its_state(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    step = run.step

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    run.step = interrupted  # type: ignore[method-assign]
    run.train()
    assert run.state.step == 1
    assert [path.name for path in run.last.parent.glob("state-*")] == ["state-00000001"]


def test_steps_without_finite_gradients_are_skipped(tmp_path: Path) -> None:
    run = tiny(tmp_path, "lightning.trainer.max_steps=4")
    fail_at(run, {1, 2})
    before = {name: value.clone() for name, value in weights(run).items()}
    run.train()
    assert (run.state.step, run.state.skipped) == (4, 2)
    assert all(value.isfinite().all() for value in weights(run).values())
    assert not torch.equal(before["unet.out.2.weight"], weights(run)["unet.out.2.weight"])


def test_a_run_that_diverges_stops_with_state_and_batch_on_disk(tmp_path: Path) -> None:
    run = tiny(tmp_path, "lightning.trainer.nan_limit=3")
    fail_at(run, set(range(2, 9)))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        run.train()
    batch = torch.load(tmp_path / "not-finite-rank0.pt", weights_only=True)[0]
    assert len(batch["txt"]) == run.batch_size
    again = tiny(tmp_path)
    again.resume()
    assert again.state.step == 5
    assert torch.equal(weights(again)["unet.out.2.weight"], weights(run)["unet.out.2.weight"])


def test_a_run_that_diverges_keeps_a_state_from_before_however_often_it_is_resumed(
    tmp_path: Path,
) -> None:
    tiny(tmp_path, "lightning.trainer.max_steps=4", "lightning.callbacks.save_steps=2").train()
    good = tmp_path / "checkpoints/state-00000004"
    kept = {path: path.read_bytes() for path in good.iterdir()}
    words = ["trainer.max_steps=99", "trainer.nan_limit=3", "callbacks.save_steps=2"]
    words = ["model.base_learning_rate=1e38", *(f"lightning.{word}" for word in words)]
    for _ in range(2):
        again = tiny(tmp_path, *words)
        again.resume()
        with pytest.raises(FloatingPointError, match="has earlier states"):
            again.train()
        assert {path: path.read_bytes() for path in good.iterdir()} == kept
    assert len([*good.parent.glob("state-*")]) == 2


def test_numbers_that_were_lost_are_not_written(tmp_path: Path) -> None:
    run = tiny(tmp_path, "lightning.trainer.max_steps=2")
    run.train()
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    run.state.step = 3
    run.state.ema.shadow["unet.out.2.weight"][0] = torch.nan
    run.save()
    run.export()
    assert {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()} == before


def test_a_full_disk_neither_ends_a_run_nor_costs_a_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny(tmp_path, "lightning.trainer.max_steps=2")
    run.train()
    again = tiny(tmp_path, "lightning.trainer.max_steps=5", "lightning.callbacks.save_steps=1")
    again.resume()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if no more would fit
    try:
        with caplog.at_level("ERROR", "ldm"), pytest.raises(OSError, match="could not be written"):
            again.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert again.state.step == 5
    assert "training goes on" in caplog.text
    assert [path.name for path in run.last.parent.iterdir()].count("state-00000002") == 1
    assert not list(run.last.parent.glob(".state-*"))
    run.resume()
    assert run.state.step == 2


def test_a_state_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    run = tiny(tmp_path, "lightning.trainer.max_steps=1")
    run.train()
    state = run.states.newest()
    assert state is not None
    (state / ".metadata").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ValueError, match=r"refused: it would call `os\.system`"):
        run.resume()


def fail_at(run: Run, steps: set[int]) -> None:
    """The loss is not a number at these steps."""
    player = run.state.players["model"]
    loss = player.loss

    def failing(batch: Any, generator: torch.Generator) -> Any:
        factor = float("nan") if run.state.step in steps else 1.0
        return {"loss": loss(batch, generator)["loss"] * factor}

    player.loss = failing


def test_a_run_ends_by_time(tmp_path: Path) -> None:
    run = tiny(tmp_path, "lightning.trainer.max_steps=null", "lightning.trainer.max_time=0.5")
    run.train()
    assert 0 < run.state.step < 200
    assert run.progress() >= 1


def test_the_log_has_a_line_every_few_steps(tmp_path: Path) -> None:
    tiny(tmp_path, "lightning.trainer.max_steps=10").train()
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10"]
    assert float(rows[-1]["loss"]) > 0


def test_latents_are_cached_and_used(tmp_path: Path) -> None:
    latents = [f"data.params.latents.cache={tmp_path}", "data.params.latents.variants=2"]
    first, again = tiny(tmp_path, *latents), tiny(tmp_path, *latents)
    source: Any = first.source
    assert source.dataset[0, 0]["z"].shape == (4, 8, 8)
    assert len(list(tmp_path.glob("latents-*.pt"))) == 1
    other: Any = again.source
    assert other.dataset[3, 5]["txt"] == source.dataset[3, 5]["txt"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lightning.trainer.max_step=3", "did you mean `max_steps`"),
        ("lightning.trainers.max_steps=3", "did you mean `trainer`"),
        ("lightning.trainer.max_steps=null", "needs `max_steps` or `max_time`"),
        ("data.params.train.transform.name=emojis", "did you mean `emoji`"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, override)


def test_times_are_read_from_the_right() -> None:
    assert parse_duration("01:10:00") == 4200
    assert parse_duration("01:00:00:00") == 86400
    assert parse_duration("90") == parse_duration(90) == 90


def test_an_exported_autoencoder_has_standard_latents(tmp_path: Path) -> None:
    raw = read_yaml(ROOT / "configs/demo/autoencoder.yaml")
    raw["model"]["params"]["ddconfig"] |= {"ch_mult": [1, 1], "resolution": 16}
    raw["data"]["params"] |= {"batch_size": 2}
    raw["data"]["params"]["train"] |= {"root": ROOT / "tests/data/emoji"}
    raw["data"]["params"]["train"]["transform"] |= {"size": 16, "shift": 1, "crop": None}
    raw["lightning"]["trainer"] |= {"max_steps": 2}
    run = Run(read_settings(raw), tmp_path)
    run.train()
    model: Any = run.model
    model.load_state_dict(read_checkpoint(run.last).state)
    with torch.no_grad():
        z = torch.cat([model.encode(s["jpg"][None]).mode() for s in run.source.first_samples(23)])
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
