"""--dry-run: the config, and an estimate of the memory that training needs."""

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
from train.tinyrun import ROOT, TINY_YAML


def estimate_tiny(*overrides: str, world_size: int = 1) -> TrainingMemory:
    config = read_yaml(TINY_YAML, overrides)
    return memory_estimate.estimate_training_memory(read_settings(config), world_size)


def test_the_peak_is_that_of_live_storages() -> None:
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
def test_all_memory_is_counted(parameterization: str) -> None:
    model = f"model.params.parameterization={parameterization}"
    estimate = estimate_tiny("lightning.optimizer.name=adamw", model)
    assert estimate.gradients == estimate.ema == 4 * estimate.num_trainable
    assert estimate.optimizer == 8 * estimate.num_trainable
    assert estimate.weights == 4 * estimate.num_parameters
    assert estimate.total > estimate.weights + 4 * estimate.gradients
    assert 5e6 < estimate.activations < 5e7


@pytest.fixture(scope="module")
def full() -> TrainingMemory:
    return estimate_tiny()


@pytest.mark.slow
def test_checkpointing_and_small_batches_keep_fewer_activations(full: TrainingMemory) -> None:
    saving = estimate_tiny(
        "lightning.trainer.gradient_checkpointing=true", "data.params.batch_size=4"
    )
    assert saving.activations < 0.75 * full.activations


@pytest.mark.slow
def test_a_textual_inversion_keeps_activations_of_the_frozen_unet(full: TrainingMemory) -> None:
    token = estimate_tiny("lightning.textual_inversion.token=<x>")
    assert token.num_trainable == 32
    assert token.activations > 0.5 * full.activations


@pytest.mark.slow
@pytest.mark.parametrize("perceptual_weight", [0, 1])
def test_the_networks_of_an_autoencoders_losses_are_counted(perceptual_weight: int) -> None:
    overrides = [
        "model.params.ddconfig.ch=32", "model.params.ddconfig.ch_mult=[1,2]",
        "model.params.ddconfig.num_res_blocks=1", "model.params.ema_decay=0.999",
        f"model.params.lossconfig.params.perceptual_weight={perceptual_weight}",
        "data.params.train={root: x, transform: {name: photo, size: 64}}",
        "data.params.batch_size=2", "data.params.validation=null",
    ]  # fmt: skip
    config = read_yaml(ROOT / "configs/autoencoder/autoencoder_kl_32x32x4.yaml", overrides)
    settings = read_settings(config)
    estimate = memory_estimate.estimate_training_memory(settings)
    discriminator = sum(p.numel() for p in PatchDiscriminator().parameters())
    lpips = sum(p.numel() for p in LPIPS().parameters())
    assert estimate.num_parameters - estimate.num_trainable == perceptual_weight * lpips
    assert estimate.num_trainable - estimate.ema / 4 == discriminator
    assert estimate.optimizer == 8 * estimate.num_trainable
    assert estimate.activations > 2 * 3 * 64 * 64 * 4 * (1 + perceptual_weight) * 64
    saving = settings.replace(trainer={"gradient_checkpointing": True})
    assert memory_estimate.estimate_training_memory(saving).activations < estimate.activations


@pytest.fixture
def fake_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the simulated step, which takes long, by a formula."""

    def measure(task: Any, settings: Any) -> float:
        return 1e6 * settings.loader.batch_size

    monkeypatch.setattr(memory_estimate, "_measure_activations", measure)


@pytest.mark.usefixtures("fake_activations")
def test_settings_reduce_the_memory() -> None:
    replicated = estimate_tiny("lightning.optimizer.name=adamw")
    sharded = estimate_tiny(
        "lightning.optimizer.name=adamw", "lightning.trainer.strategy=fsdp", world_size=4
    )
    assert sharded.optimizer == replicated.optimizer // 4
    assert sharded.total < replicated.total
    assert estimate_tiny("lightning.trainer.ema_device=cpu").ema == 0
    lora = estimate_tiny("lightning.lora.rank=2")
    assert lora.num_trainable < 0.05 * lora.num_parameters
    assert lora.optimizer < 0.2 * lora.weights


@pytest.mark.usefixtures("fake_activations")
def test_a_dry_run_prints_the_config_and_suggestions() -> None:
    config: Any = read_yaml(TINY_YAML, ["data.params.batch_size=2"])
    lines = list(memory_estimate.describe_run(read_settings(config), world_size=2))
    assert parse_yaml(lines[0])["lightning"]["trainer"]["nan_limit"] == 10
    text = "\n".join(lines)
    assert "2 x 1 accumulated x 2 ranks" in text
    assert "lightning.trainer.strategy=fsdp" in text
    assert "data.params.batch_size=1 lightning.trainer.accumulate_grad_batches=2" in text


@pytest.mark.usefixtures("fake_activations")
@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("lightning.trainer.strategy=fsdp", "ema_device=cpu"),
        ("lightning.trainer.ema_device=cpu", "strategy=fsdp"),
        ("lightning.lora.rank=64", "strategy=fsdp"),
    ],
)
def test_a_dry_run_suggests_no_refused_settings(override: str, suggestion: str) -> None:
    config: Any = read_yaml(TINY_YAML, [override])
    _, *lines = memory_estimate.describe_run(read_settings(config), world_size=2)
    assert suggestion not in "\n".join(lines)
