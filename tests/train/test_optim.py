"""Optimizers and learning rates."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldm.train.optim.adamw import AdamW
from ldm.train.optim.optimizers import make_optimizer, orthogonalize
from ldm.train.optim.schedules import LearningRate


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"`adamw8bit` needs `pip install 'ldm-revived\[8bit\]'`"):
        make_optimizer(nn.Linear(2, 2), 1.0, name="adamw8bit")


@pytest.mark.parametrize("shape", [(24, 100), (100, 24), (32, 32)])
def test_orthogonal_pulls_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalize(matrix)
    values = torch.linalg.svdvals(made)
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert torch.cosine_similarity(made.flatten(), (u @ v).flatten(), dim=0) > 0.95


RATES = {"adamw": 0.05, "adamw8bit": 0.05, "adafactor": 0.5, "muon": 0.2}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", RATES)
def test_an_optimizer_fits_a_line(name: str) -> None:
    needs(name)
    torch.manual_seed(0)
    lr = RATES[name]
    module, x = nn.Linear(20, 20), torch.randn(64, 20)
    target = x @ torch.randn(20, 20)
    optimizer = make_optimizer(module, lr, name=name)
    rate, losses = LearningRate(lr, warm_up=5, decay="linear"), []
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, step / 100)
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", RATES)
def test_what_an_optimizer_remembers_can_be_written_and_read(name: str) -> None:
    """Three steps equal two, a state of tensors by name, and a third."""
    needs(name)
    whole, parts = layer(), layer()
    first = make_optimizer(whole, 1e-2, name=name)
    for seed in range(3):
        step(whole, first, seed)
    second = make_optimizer(parts, 1e-2, name=name)
    for seed in range(2):
        step(parts, second, seed)
    kept = {
        p: {key: torch.as_tensor(value).clone() for key, value in second.state[p].items()}
        for p in parts.parameters()
    }
    third = make_optimizer(parts, 1e-2, name=name)
    state = third.state_dict()
    state["state"] = {number: kept[p] for number, p in enumerate(ordered(third))}
    third.load_state_dict(state)
    step(parts, third, 2)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("numbers", [3, 40, 1001, 4096])
def test_a_weight_becomes_the_same_however_its_tensor_is_split(numbers: int) -> None:
    """And torch's own up to rounding: its loop rounds after every operation, the kernel once."""
    start = torch.randn(numbers, generator=torch.Generator().manual_seed(0))
    whole = adamw_steps(start.split(numbers), AdamW)
    parts = adamw_steps(start.split([numbers // 3, numbers - numbers // 3]), AdamW)
    assert torch.equal(whole, parts)
    plain = adamw_steps(start.split(numbers), torch.optim.AdamW)
    torch.testing.assert_close(whole, plain, rtol=1e-6, atol=1e-6)


def adamw_steps(parts: tuple[Tensor, ...], kind: Any) -> Tensor:
    weights = [nn.Parameter(part.clone()) for part in parts]
    optimizer = kind(weights, lr=1e-2)
    for seed in range(3):
        numbers = sum(len(p) for p in weights)
        grad = torch.randn(numbers, generator=torch.Generator().manual_seed(seed))
        for p, g in zip(weights, grad.split([len(p) for p in weights]), strict=True):
            p.grad = g.clone()
        optimizer.step()
    return torch.cat([p.detach() for p in weights])


def test_adamw_keeps_weights_that_are_channels_last_in_their_order() -> None:
    made = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=layout))
        optimizer = AdamW([weight], 1e-2)
        for _ in range(2):
            weight.grad = torch.randn(4, 3, 3, 3)
            optimizer.step()
        made.append(weight.detach())
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-7)


def test_muon_does_the_same_with_split_weights(group: None) -> None:
    alone, split = layer(), layer()
    fully_shard(split, mesh=init_device_mesh("cpu", (1,)))
    for module in (alone, split):
        optimizer = make_optimizer(module, 1e-2, name="muon")
        for seed in range(2):
            step(module, optimizer, seed)
    assert isinstance(split.weight, DTensor)
    for ours, theirs in zip(split.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs)


def needs(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(80, 64)  # more than 4096 numbers, fewer stay in 32 bits


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 80, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()


def ordered(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_vectors_embeddings_and_narrow_matrices_are_left_to_adam() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(40, 40), "wide": nn.Linear(40, 40)})
    module["narrow"] = nn.Linear(40, 4)
    groups = {
        group["matrix"]: group["params"]
        for group in make_optimizer(module, 1.0, name="muon").param_groups
    }
    assert [p.shape for p in groups[True]] == [torch.Size([40, 40])]
    assert len(groups[False]) == 4


def test_the_rate_warms_up_and_decays_to_nothing() -> None:
    assert LearningRate(1.0, warm_up=10)(0, 0.0) == pytest.approx(0.1)
    assert LearningRate(1.0, warm_up=10, decay="linear")(50, 0.5) == pytest.approx(0.5)
    assert LearningRate(1.0, warm_up=10, decay="cosine")(99, 1.0) == pytest.approx(0.0)
    assert LearningRate(1.0, warm_up=10)(99, 1.0) == 1.0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer `adanw`, did you mean `adamw`"):
        make_optimizer(nn.Linear(2, 2), 1.0, name="adanw")
    with pytest.raises(ValueError, match="unknown key of muon `momentun`, did you mean `momentum`"):
        make_optimizer(nn.Linear(2, 2), 1.0, name="muon", momentun=0.9)
    with pytest.raises(ValueError, match="unknown decay `best`"):
        LearningRate(1.0, decay="best")
