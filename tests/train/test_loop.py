"""The training loop: stopping, resuming, non-finite steps, damaged states, a full disk."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.loading.files.checkpoint import read_checkpoint
from ldm.nets.autoencoder import AutoencoderKL
from ldm.train import loop
from ldm.train.loop import save_state, train
from ldm.train.run import Run
from ldm.train.runs.exports import export
from train.tinyrun import (
    HELD_OUT,
    build_run_from,
    build_tiny_run,
    collect_weights,
    make_tiny_config,
    resume_newest,
)

MAX_STEPS = "lightning.trainer.max_steps="
SAVE_STEPS = "lightning.callbacks.save_steps="


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 4 steps, with states of the last two; tests must not change it."""
    run = build_tiny_run(tmp_path_factory.mktemp("run"), MAX_STEPS + "4", SAVE_STEPS + "3")
    train(run)
    return run


def resume_copy(run: Run, folder: Path, *overrides: str) -> Run:
    """Build a run in another folder, and resume it from the newest state of `run`."""
    copy = build_tiny_run(folder, *overrides)
    resume_newest(copy, run.folder)
    return copy


def make_loss_nan(run: Run, steps: set[int]) -> None:
    """Make the loss of the run NaN at these steps."""
    loss = run.state.model.loss

    def compute_loss(batch: Any, generator: torch.Generator) -> Any:
        factor = float("nan") if run.state.step in steps else 1.0
        return {"loss": loss(batch, generator)["loss"] * factor}

    run.state.model.loss = compute_loss


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file()}


def test_a_resumed_run_equals_an_uninterrupted_one(four_steps: Run, tmp_path: Path) -> None:
    run = build_tiny_run(tmp_path, MAX_STEPS + "4")
    run.resume(four_steps.checkpoints / "state-00000003")
    assert run.state.step == 3
    train(run)
    torch.testing.assert_close(collect_weights(run), collect_weights(four_steps), rtol=0, atol=0)


def test_a_signal_stops_the_run_after_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, train_step = build_tiny_run(tmp_path), loop.train_step

    def interrupt(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupt)
    train(run)
    assert run.state.step == 1
    assert [path.name for path in run.checkpoints.glob("state-*")] == ["state-00000001"]


def test_an_unknown_monitor_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    callbacks = {"validate_steps": 1000, "save_top_k": 1, "monitor": "val/psnr"}
    overrides = [f"lightning.callbacks.{key}={value}" for key, value in callbacks.items()]
    run = build_tiny_run(tmp_path, HELD_OUT, *overrides)
    with pytest.raises(ValueError, match="`val/psnr` should be one of val/loss, val/loss_simpl"):
        train(run)
    assert (run.state.step, list(tmp_path.iterdir())) == (0, [])


def test_a_resumed_run_keeps_its_measured_scale_factor(tmp_path: Path) -> None:
    measure = ["model.params.scale_factor=1.0", "model.params.scale_by_std=true"]
    run = build_tiny_run(tmp_path, *measure)
    save_state(run)
    resumed = build_tiny_run(tmp_path, *measure, "data.params.batch_size=3")
    assert resumed.model.scale_factor != run.model.scale_factor
    resume_newest(resumed)
    assert resumed.model.scale_factor == run.model.scale_factor


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 8), (4, 2), (3, 2)])
def test_a_resumed_run_with_another_batch_size_keeps_its_position(
    four_steps: Run, tmp_path: Path, batch_size: int, batches: int
) -> None:
    assert (four_steps.batch_size, four_steps.state.batches_consumed) == (2, 4)
    override = f"data.params.batch_size={batch_size}"
    run = resume_copy(four_steps, tmp_path, override)
    assert run.state.batches_consumed == batches
    save_state(run)
    again = resume_copy(run, tmp_path, override)
    assert again.state.batches_consumed == batches


@pytest.mark.usefixtures("no_states")
def test_steps_without_finite_gradients_are_skipped(tmp_path: Path) -> None:
    run = build_tiny_run(tmp_path, MAX_STEPS + "3")
    make_loss_nan(run, {1})
    before = run.model.state_dict()["unet.out.2.weight"].clone()
    train(run)
    assert (run.state.step, run.state.skipped_steps) == (3, 1)
    assert all(value.isfinite().all() for value in collect_weights(run).values())
    assert not torch.equal(before, run.model.state_dict()["unet.out.2.weight"])


def test_a_diverging_run_saves_its_state_and_batch_and_ends(
    four_steps: Run, tmp_path: Path
) -> None:
    run = resume_copy(four_steps, tmp_path, "lightning.trainer.nan_limit=2")
    make_loss_nan(run, {5, 6, 7})
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        train(run)
    (batch,) = torch.load(tmp_path / "not-finite-rank0.pt", weights_only=True)
    assert len(batch["txt"]) == run.batch_size
    resumed = build_tiny_run(tmp_path)
    resume_newest(resumed)
    assert resumed.state.step == 7
    weight, expected = (collect_weights(r)["unet.out.2.weight"] for r in (resumed, run))
    assert torch.equal(weight, expected)


@pytest.mark.slow
def test_a_diverging_run_never_replaces_finite_states(four_steps: Run, tmp_path: Path) -> None:
    run = resume_copy(four_steps, tmp_path)
    save_state(run)
    finite = tmp_path / "checkpoints/state-00000004"
    content = read_files(finite)
    overrides = ("lightning.trainer.nan_limit=3", "model.base_learning_rate=1.0e+38")
    diverging = build_tiny_run(tmp_path, SAVE_STEPS + "1", *overrides)
    resume_newest(diverging)
    with pytest.raises(FloatingPointError, match="has earlier states"):
        train(diverging)
    assert read_files(finite) == content
    assert len([*finite.parent.glob("state-*")]) == 2


def test_non_finite_weights_are_not_written(four_steps: Run, tmp_path: Path) -> None:
    run = resume_copy(four_steps, tmp_path)
    save_state(run)
    before = read_files(tmp_path)
    run.state.step = 5
    run.state.ema.shadow["unet.out.2.weight"][0] = torch.nan
    save_state(run)
    export(run)
    assert read_files(tmp_path) == before


@pytest.mark.slow
def test_a_full_disk_neither_ends_a_run_nor_loses_a_state(
    four_steps: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource", reason="Windows limits no file's size")
    run = resume_copy(four_steps, tmp_path, MAX_STEPS + "6", SAVE_STEPS + "1")
    save_state(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with caplog.at_level("ERROR", "ldm"), pytest.raises(OSError, match="could not be written"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.state.step == 6
    failures = [m for m in caplog.messages if "training continues" in m]
    assert failures
    assert all(f"{tmp_path}" in message and "Errno" not in message for message in failures)
    assert [path.name for path in run.checkpoints.iterdir()] == ["state-00000004"]
    resume_newest(run)
    assert run.state.step == 4


def test_files_of_killed_processes_are_removed(four_steps: Run, tmp_path: Path) -> None:
    """One was killed after it had renamed an old state, another while writing the next."""
    run = resume_copy(four_steps, tmp_path)
    state = run.states.save(run.state)
    state.rename(state.with_name(f".{state.name}.old"))
    (run.checkpoints / ".state-00000005.part").mkdir()
    run.state.step = 6
    run.states.save(run.state)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["state-00000004", "state-00000006"]


def test_a_malicious_state_is_refused(four_steps: Run, tmp_path: Path) -> None:
    run = resume_copy(four_steps, tmp_path)
    (run.states.save(run.state) / ".metadata").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(ValueError, match=r"refused: it would call `os\.system`"):
        resume_newest(run)


@pytest.mark.parametrize("name", ["run.json", "__0_0.distcp"])
def test_a_damaged_state_is_refused(four_steps: Run, tmp_path: Path, name: str) -> None:
    run = resume_copy(four_steps, tmp_path)
    path = run.states.save(run.state) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"state-\d+` is damaged, resume from an older state"):
        resume_newest(run)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_state_of_another_optimizer_is_refused(
    four_steps: Run, tmp_path: Path, name: str
) -> None:
    message = r"of another model or optimizer: `model\.optimizer\..*mean"
    with pytest.raises(ValueError, match=message):
        resume_copy(four_steps, tmp_path, f"lightning.optimizer.name={name}")


@pytest.mark.usefixtures("no_states")
def test_a_run_ends_after_max_time(four_steps: Run, tmp_path: Path) -> None:
    run = resume_copy(four_steps, tmp_path, MAX_STEPS + "null", "lightning.trainer.max_time=0.2")
    run.state.seconds = 0.0
    train(run)
    assert 4 < run.state.step < 200
    assert run.get_progress() >= 1


@pytest.mark.usefixtures("no_states")
def test_an_exported_autoencoder_has_standard_latents(tmp_path: Path) -> None:
    config = make_tiny_config(MAX_STEPS + "2")
    autoencoder = config["model"]["params"]["first_stage_config"]
    autoencoder["params"]["ddconfig"] |= {"ch_mult": [1, 1], "resolution": 16}
    config["model"] = {**autoencoder, "base_learning_rate": 1e-3}
    config["data"]["params"]["train"]["transform"] |= {"size": 16, "shift": 1}
    run = build_run_from(config, tmp_path)
    train(run)
    model = run.model
    assert isinstance(model, AutoencoderKL)
    model.load_state_dict(read_checkpoint(run.checkpoints / "last.safetensors").state_dict)
    samples = run.source.load_fixed_samples(23)
    with torch.no_grad():
        z = torch.cat([model.encode(sample["jpg"][None]).mode() for sample in samples])
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
