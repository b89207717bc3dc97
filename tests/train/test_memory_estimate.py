"""--dry-run: what would be trained, and the memory that it needs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.loading.config import parse_yaml, read_yaml
from ldm.nets.discriminator import PatchDiscriminator
from ldm.nets.lpips import LPIPS
from ldm.train import memory_estimate
from ldm.train.config.settings import read_settings
from ldm.train.memory_estimate import TrainingMemory
from quick import slow_except

ROOT = Path(__file__).parents[2]


def estimate_tiny(*overrides: str, processes: int = 1) -> TrainingMemory:
    raw = read_yaml(ROOT / "configs/train/tiny.yaml", overrides)
    return memory_estimate.estimate_training_memory(read_settings(raw), processes)


def test_the_peak_counts_storages_that_are_alive() -> None:
    outside = torch.zeros(1000)
    with memory_estimate.PeakMemoryMode() as mode:
        first = outside[:10].t() + torch.zeros(1000)[:10]
        del first
        first = torch.zeros(1000)
        second = first + 1
        assert mode.current == 8000
        view = second[:10]
        del second
        assert mode.current == 8000
        del view
        assert mode.current == 4000
    assert mode.peak == 8000


@pytest.mark.parametrize("parameterization", slow_except(["v", "eps"], "v"))
def test_every_part_of_the_memory_is_counted(parameterization: str) -> None:
    model = f"model.params.parameterization={parameterization}"
    whole = estimate_tiny("lightning.optimizer.name=adamw", model)
    assert whole.gradients == whole.ema == 4 * whole.num_trainable
    assert whole.optimizer == 8 * whole.num_trainable
    assert whole.weights == 4 * whole.num_parameters
    assert whole.total > whole.weights + 4 * whole.gradients
    assert 5e6 < whole.activations < 5e7


@pytest.fixture(scope="module")
def whole() -> TrainingMemory:
    return estimate_tiny()


@pytest.mark.slow
def test_checkpointing_and_small_batches_keep_fewer_activations(whole: TrainingMemory) -> None:
    small = estimate_tiny(
        "lightning.trainer.gradient_checkpointing=true", "data.params.batch_size=4"
    )
    assert small.activations < 0.75 * whole.activations


@pytest.mark.slow
def test_gradients_of_a_token_go_through_the_frozen_unet(whole: TrainingMemory) -> None:
    token = estimate_tiny("lightning.textual_inversion.token=<x>")
    assert token.num_trainable == 32
    assert token.activations > 0.5 * whole.activations


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0, 1])
def test_the_networks_of_an_autoencoders_losses_are_counted(weight: int) -> None:
    small = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    overrides = [f"model.params.ddconfig.{key}={value}" for key, value in small.items()]
    overrides += [f"model.params.lossconfig.params.perceptual_weight={weight}"]
    overrides += ["model.params.ema_decay=0.999"]
    data = [
        "batch_size=2",
        "train={root: x, transform: {name: photo, size: 64}}",
        "validation=null",
    ]
    overrides += [f"data.params.{override}" for override in data]
    raw = read_yaml(ROOT / "configs/autoencoder/autoencoder_kl_32x32x4.yaml", overrides)
    settings = read_settings(raw)
    result = memory_estimate.estimate_training_memory(settings)
    discriminator = sum(p.numel() for p in PatchDiscriminator().parameters())
    lpips = sum(p.numel() for p in LPIPS().parameters())
    assert result.num_parameters - result.num_trainable == weight * lpips
    assert result.num_trainable - result.ema / 4 == discriminator
    assert result.optimizer == 8 * result.num_trainable
    assert result.activations > 2 * 3 * 64 * 64 * 4 * (1 + weight) * 64
    saving = settings.replace(trainer={"gradient_checkpointing": True})
    assert memory_estimate.estimate_training_memory(saving).activations < result.activations


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the simulated step."""
    monkeypatch.setattr(
        memory_estimate,
        "_measure_activations",
        lambda task, settings: 1e6 * settings.loader.batch_size,
    )


@pytest.mark.usefixtures("quick")
def test_settings_lower_the_memory() -> None:
    whole = estimate_tiny("lightning.optimizer.name=adamw")
    split = estimate_tiny(
        "lightning.optimizer.name=adamw", "lightning.trainer.strategy=fsdp", processes=4
    )
    assert split.optimizer == whole.optimizer // 4
    assert split.total < whole.total
    assert estimate_tiny("lightning.trainer.ema_device=cpu").ema == 0
    lora = estimate_tiny("lightning.lora.rank=2")
    assert lora.num_trainable < 0.05 * lora.num_parameters
    assert lora.optimizer < 0.2 * lora.weights


@pytest.mark.usefixtures("quick")
def test_a_dry_run_prints_the_whole_config_and_what_would_help() -> None:
    raw: Any = read_yaml(ROOT / "configs/train/tiny.yaml", ["data.params.batch_size=2"])
    lines = list(memory_estimate.describe_run(read_settings(raw), processes=2))
    assert parse_yaml(lines[0])["lightning"]["trainer"]["nan_limit"] == 10
    text = "\n".join(lines)
    assert "2 x 1 accumulated x 2 ranks" in text
    assert "lightning.trainer.strategy=fsdp" in text
    assert "data.params.batch_size=1 lightning.trainer.accumulate_grad_batches=2" in text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("lightning.trainer.strategy=fsdp", "ema_device=cpu"),
        ("lightning.trainer.ema_device=cpu", "strategy=fsdp"),
        ("lightning.lora.rank=64", "strategy=fsdp"),
    ],
)
def test_a_dry_run_does_not_suggest_what_would_be_refused(override: str, suggestion: str) -> None:
    raw: Any = read_yaml(ROOT / "configs/train/tiny.yaml", [override])
    assert suggestion not in "\n".join(
        list(memory_estimate.describe_run(read_settings(raw), processes=2))[1:]
    )
