"""Optimizers and learning rate schedules."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldm.train.optim.adamw import AdamW
from ldm.train.optim.optimizers import make_optimizer, orthogonalize
from ldm.train.optim.schedules import LearningRateSchedule
from ldm.train.state import TrainedNetwork


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"`adamw8bit` needs `pip install 'ldm-revived\[8bit\]'`"):
        make_optimizer(nn.Linear(2, 2), 1.0, name="adamw8bit")


@pytest.mark.parametrize("shape", [(24, 100), (100, 24), (32, 32)])
def test_singular_values_of_an_orthogonalized_matrix_are_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    orthogonal = orthogonalize(matrix)
    values = torch.linalg.svdvals(orthogonal)
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert torch.cosine_similarity(orthogonal.flatten(), (u @ v).flatten(), dim=0) > 0.95


LEARNING_RATES = {"adamw": 0.05, "adamw8bit": 0.05, "adafactor": 0.5, "muon": 0.2}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_an_optimizer_fits_a_linear_layer(name: str) -> None:
    skip_without_package(name)
    torch.manual_seed(0)
    lr = LEARNING_RATES[name]
    module, x = nn.Linear(20, 20), torch.randn(64, 20)
    target = x @ torch.randn(20, 20)
    optimizer = make_optimizer(module, lr, name=name)
    schedule, losses = LearningRateSchedule(lr, warmup_steps=5, scheduler="linear"), []
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, step / 100)
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_the_state_of_an_optimizer_can_be_saved_and_loaded(name: str) -> None:
    """A third step from the loaded state equals a third step without interruption."""
    skip_without_package(name)
    uninterrupted, resumed = build_network(name), build_network(name)
    for seed in range(2):
        run_step(uninterrupted, seed)
    state = {name: x.clone() for name, x in uninterrupted.get_optimizer_state().items()}
    shapes = {name: (x.shape, x.dtype) for name, x in state.items()}
    allocated = resumed.allocate_optimizer_state(shapes)
    assert {name: (x.shape, x.dtype) for name, x in allocated.items()} == shapes
    resumed.module.load_state_dict(uninterrupted.module.state_dict())
    resumed.load_optimizer_state(state)
    for network in (uninterrupted, resumed):
        run_step(network, 2)
    weights = (network.module.parameters() for network in (uninterrupted, resumed))
    assert all(torch.equal(actual, expected) for expected, actual in zip(*weights, strict=True))


@pytest.mark.parametrize("n", [3, 40, 1001, 4096])
def test_adamw_does_not_depend_on_how_a_tensor_is_split(n: int) -> None:
    """It equals torch's up to rounding: torch rounds after each operation, our kernel once."""
    unsplit, split = run_adamw_steps([n], AdamW), run_adamw_steps([n // 3, n - n // 3], AdamW)
    assert torch.equal(unsplit, split)
    expected = run_adamw_steps([n], torch.optim.AdamW)
    torch.testing.assert_close(unsplit, expected, rtol=1e-6, atol=1e-6)


def run_adamw_steps(sizes: list[int], optimizer_class: type[torch.optim.Optimizer]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(sum(sizes), generator=generator).split(sizes)
    weights = [nn.Parameter(x) for x in initial]
    optimizer = optimizer_class(weights, lr=1e-2)
    for _ in range(3):
        gradients = torch.randn(sum(sizes), generator=generator).split(sizes)
        for p, gradient in zip(weights, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    return torch.cat([p.detach() for p in weights])


def test_adamw_gives_the_same_for_channels_last_weights() -> None:
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=layout))
        optimizer = AdamW([weight], 1e-2)
        for _ in range(2):
            weight.grad = torch.randn(4, 3, 3, 3)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-7)


def test_muon_gives_the_same_for_sharded_weights(process_group: None) -> None:
    plain, sharded = build_network("muon"), build_network("muon", is_sharded=True)
    for seed in range(2):
        run_step(plain, seed)
        run_step(sharded, seed)
    for actual, expected in zip(
        sharded.module.parameters(), plain.module.parameters(), strict=True
    ):
        assert isinstance(actual, DTensor)
        assert torch.equal(actual.full_tensor(), expected)


def skip_without_package(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")


def build_network(name: str, is_sharded: bool = False) -> TrainedNetwork:
    torch.manual_seed(0)
    layer = nn.Linear(80, 64)  # 8-bit optimizers need more than 4096 weights
    if is_sharded:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    return TrainedNetwork(layer, make_optimizer(layer, 1e-2, name=name), lambda *_: {})


def run_step(network: TrainedNetwork, seed: int) -> None:
    x = torch.randn(8, 80, generator=torch.Generator().manual_seed(seed))
    network.optimizer.zero_grad()
    network.module(x).square().mean().backward()
    network.optimizer.step()


def test_vectors_embeddings_and_narrow_matrices_are_trained_by_adam() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(40, 40), "wide": nn.Linear(40, 40)})
    module["narrow"] = nn.Linear(40, 4)
    optimizer = make_optimizer(module, 1.0, name="muon")
    groups = {group["matrix"]: group["params"] for group in optimizer.param_groups}
    assert [p.shape for p in groups[True]] == [torch.Size([40, 40])]
    assert len(groups[False]) == 4


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    constant, linear, cosine = (
        LearningRateSchedule(1.0, warmup_steps=10, scheduler=scheduler)
        for scheduler in ("constant", "linear", "cosine")
    )
    assert constant(0, 0.0) == pytest.approx(0.1)
    assert constant(99, 1.0) == 1.0
    assert linear(50, 0.5) == pytest.approx(0.5)
    assert cosine(99, 1.0) == pytest.approx(0.0)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer `adanw`, did you mean `adamw`"):
        make_optimizer(nn.Linear(2, 2), 1.0, name="adanw")
