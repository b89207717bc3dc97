"""Validation, sample grids and exports of a run."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.loading.config import parse_yaml
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.load import load
from ldm.train.loop import train
from ldm.train.monitoring.samples import draw_samples
from ldm.train.monitoring.validation import validate
from ldm.train.run import Run
from ldm.train.runs.exports import export, export_best, export_step
from train.tinyrun import HELD_OUT, build_tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps with held-out images."""
    run = build_tiny_run(
        tmp_path_factory.mktemp("run"),
        HELD_OUT,
        "lightning.callbacks.sampling={steps: 2}",
        "lightning.trainer.max_steps=2",
    )
    train(run)
    return run


def change_callbacks(run: Run, **callbacks: Any) -> Run:
    """Return the same run with other settings."""
    return replace(run, settings=run.settings.replace(callbacks=callbacks))


def test_validation_is_reproducible_and_changes_nothing(run: Run) -> None:
    run.task.trainable.train()
    modes = [module.training for module in run.model.modules()]
    losses = validate(run)
    torch.manual_seed(99)
    assert validate(run) == losses
    assert [module.training for module in run.model.modules()] == modes
    assert set(losses) >= {"val/loss", "val/loss_ema", "val/loss_simple_ema"}
    assert losses["val/loss"] != losses["val/loss_ema"]


def test_sample_grids_are_named_by_step_and_reproducible(run: Run) -> None:
    with_grids = change_callbacks(run, max_images=2, prompts=["a red cat"])
    train_path, val_path = draw_samples(with_grids)
    assert train_path == run.folder / "images/train/samples_gs-000002_e-000000_b-000002.png"
    assert val_path.parent.name == "val"
    assert train_path.with_suffix(".txt").read_text() == "a red cat\na red cat\n"
    content = train_path.read_bytes()
    assert draw_samples(with_grids)[0].read_bytes() == content
    assert draw_samples(change_callbacks(run, max_images=0)) == []


def test_the_best_exports_are_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_remaining(**options: Any) -> list[str]:
        """Return the losses in the names of the files that remain after five validations."""
        copy = replace(change_callbacks(run, export=["safetensors"], **options), folder=tmp_path)
        for step, loss in enumerate((0.5, 0.3, 0.4, math.nan, 0.1)):
            monkeypatch.setattr(run.state, "step", step)
            export_best(copy, {"val/loss": 1 - loss, "val/loss_ema": loss})
        names = [path.name.rpartition("=")[2] for path in sorted(copy.checkpoints.glob("*"))]
        shutil.rmtree(copy.checkpoints, ignore_errors=True)
        return [name.removesuffix(".safetensors") for name in names]

    assert list_remaining(save_top_k=0) == []
    assert list_remaining(save_top_k=2) == ["0.300000", "0.100000"]
    assert len(list_remaining(save_top_k=-1)) == 4
    assert list_remaining(save_top_k=1, monitor="val/loss") == ["0.500000"]
    with pytest.raises(ValueError, match="`val/psnr` should be one of val/loss, val/loss_ema"):
        list_remaining(save_top_k=1, monitor="val/psnr")


def test_the_export_of_a_step_is_named_by_epoch_and_step(run: Run) -> None:
    (path,) = export_step(run)
    folder = run.checkpoints / "trainstep_checkpoints"
    assert path == folder / "epoch=000000-step=000000002.safetensors"
    assert path.exists()


@pytest.mark.parametrize("weights", ["ema", "raw", "both"])
def test_an_export_has_raw_or_ema_weights_or_both(run: Run, tmp_path: Path, weights: str) -> None:
    formats = ["safetensors", "ckpt"] if weights == "both" else ["safetensors"]
    exporting = change_callbacks(run, export_weights=weights, export=formats, export_dtype="full")
    name = "unet.out.2.weight"
    raw, ema = run.model.state_dict()[name].clone(), run.state.ema.shadow[name]
    assert not raw.equal(ema)
    for path in export(exporting, tmp_path / "last"):
        model: Any = load(None, path)
        assert model.state_dict()[name].equal(ema if weights == "ema" else raw)
        assert model.conditioner.text.token_ids.max() >= 49407  # the compact vocabulary
        file = read_checkpoint(path)
        assert (file.has_ema, file.step) == (weights == "both", 2)
        assert file.metadata["modelspec.prediction_type"] == "v"
        assert file.metadata["modelspec.resolution"] == "32x32"
        assert json.loads(file.metadata["ldm.training"])["seed"] == 23
        if weights == "both":
            averaged: Any = load(None, path, ema=True)
            assert averaged.state_dict()[name].equal(ema)
            assert float(file.ema_state_dict["model_ema.decay"]) == pytest.approx(0.9)
            assert int(file.ema_state_dict["model_ema.num_updates"]) == 2
            assert "model_ema.diffusion_modelout2weight" in file.ema_state_dict
        assert "model.diffusion_model.out.2.weight" in file.state_dict
        assert file.state_dict["alphas_cumprod"].dtype == torch.float32


def test_an_export_in_half_precision_keeps_large_weights_in_float32(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bias = run.model.get_parameter("unet.out.0.bias")
    value = bias.data[0].clone()
    bias.data[0] = 1e6
    (path,) = export(
        change_callbacks(run, export_weights="both", export_dtype="half"), tmp_path / "last"
    )
    bias.data[0] = value
    file = read_checkpoint(path)
    assert float(file.state_dict["model.diffusion_model.out.0.bias"][0]) == 1e6
    assert "1 tensors stay in float32" in caplog.text
    assert "half precision: `model.diffusion_model.out.0.bias`" in caplog.text
    assert file.state_dict["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert file.ema_state_dict["model_ema.decay"].dtype == torch.float32


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    overrides = ("lightning.lora.rank=2", "lightning.textual_inversion.token=emoji")
    return build_tiny_run(tmp_path_factory.mktemp("adapters"), *overrides)


def test_loras_and_embeddings_have_the_config_of_their_training(adapter_run: Run) -> None:
    export(adapter_run)
    for name in ("last", "last-diffusers", "last-word"):
        metadata = read_checkpoint(adapter_run.checkpoints / f"{name}.safetensors").metadata
        assert parse_yaml(metadata["ldm.training.config"])["lightning"]["lora"] == {"rank": 2}
        assert json.loads(metadata["ldm.training"])["seed"] == 23
        assert "ldm.config" not in metadata  # with which it would be a whole model


def test_the_best_loras_are_kept_with_all_their_files(
    adapter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(change_callbacks(adapter_run, save_top_k=1), folder=tmp_path)
    for step, loss in enumerate((0.5, 0.3, 0.4)):
        monkeypatch.setattr(run.state, "step", step)
        export_best(run, {"val/loss": loss, "val/loss_ema": loss})
    stem = "epoch=000000-step=000000001-loss_ema=0.300000"
    names = {path.name for path in run.checkpoints.iterdir()}
    assert names == {f"{stem}{part}.safetensors" for part in ("", "-diffusers", "-word")}
