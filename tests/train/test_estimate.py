"""--dry-run: what would be trained, and the memory that it needs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.loading.config import parse_yaml, read_yaml
from ldm.nets.discriminator import PatchDiscriminator
from ldm.nets.lpips import LPIPS
from ldm.train import estimate
from ldm.train.config.settings import read_settings

ROOT = Path(__file__).parents[2]


def memory(*overrides: str, processes: int = 1) -> estimate.Memory:
    raw = read_yaml(ROOT / "configs/train/tiny.yaml", overrides)
    return estimate.estimate(read_settings(raw), processes)


def test_live_counts_what_a_real_step_holds() -> None:
    outside = torch.zeros(1000)
    with estimate.Live() as live:
        kept = outside[:10].t() + torch.zeros(1000)[:10]
        del kept
        kept = torch.zeros(1000)
        gone = kept + 1
        assert live.now == 8000
        view = gone[:10]
        del gone
        assert live.now == 8000
        del view
        assert live.now == 4000
    assert live.peak == 8000


def test_every_part_of_the_memory_is_counted() -> None:
    found = memory("lightning.optimizer.name=adamw")
    assert found.gradients == found.average == 4 * found.trained
    assert found.optimizer == 8 * found.trained
    assert found.weights == 4 * found.parameters
    assert found.total > found.weights + 4 * found.gradients
    assert 5e6 < found.activations < 5e7
    small = memory("lightning.trainer.checkpoint_gradients=true", "data.params.batch_size=4")
    assert small.activations < 0.75 * found.activations


@pytest.mark.parametrize("weight", [0, 1])
def test_the_networks_of_an_autoencoders_losses_are_counted(weight: int) -> None:
    small = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    words = [f"model.params.ddconfig.{key}={value}" for key, value in small.items()]
    words += [f"model.params.lossconfig.params.perceptual_weight={weight}"]
    words += ["data.params.batch_size=2", "data.params.train.params.size=64"]
    raw = read_yaml(ROOT / "configs/autoencoder/autoencoder_kl_32x32x4.yaml", words)
    found = estimate.estimate(read_settings(raw))
    discriminator = sum(p.numel() for p in PatchDiscriminator().parameters())
    lpips = sum(p.numel() for p in LPIPS().parameters())
    assert found.parameters - found.trained == weight * lpips
    assert found.trained - found.average / 4 == discriminator
    assert found.optimizer == 8 * found.trained
    assert found.activations > 2 * 3 * 64 * 64 * 4 * (1 + weight) * 64


@pytest.fixture
def quick(monkeypatch: Any) -> None:
    """Without the simulated step."""
    monkeypatch.setattr(
        estimate,
        "_activations",
        lambda task, settings: 1e6 * settings.data.batch_size,
    )


@pytest.mark.usefixtures("quick")
def test_switches_lower_the_memory() -> None:
    whole = memory("lightning.optimizer.name=adamw")
    split = memory("lightning.optimizer.name=adamw", "lightning.trainer.strategy=fsdp", processes=4)
    assert split.optimizer == whole.optimizer // 4
    assert split.total < whole.total
    assert memory("lightning.trainer.ema_device=cpu").average == 0


@pytest.mark.usefixtures("quick")
def test_a_lora_needs_little_beside_the_weights() -> None:
    raw = read_yaml(ROOT / "configs/train/tiny.yaml", ["lightning.lora.rank=2"])
    found = estimate.estimate(read_settings(raw))
    assert found.trained < 0.05 * found.parameters
    assert found.optimizer < 0.2 * found.weights


@pytest.mark.usefixtures("quick")
def test_a_dry_run_prints_the_whole_config_and_what_would_help() -> None:
    raw: Any = read_yaml(ROOT / "configs/train/tiny.yaml", ["data.params.batch_size=2"])
    lines = list(estimate.describe(read_settings(raw), processes=2))
    assert parse_yaml(lines[0])["lightning"]["trainer"]["nan_limit"] == 10
    text = "\n".join(lines)
    assert "2 x 1 accumulated x 2 processes" in text
    assert "lightning.trainer.strategy=fsdp" in text
    assert "data.params.batch_size=1 lightning.trainer.accumulate_grad_batches=2" in text
