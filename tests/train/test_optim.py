"""Optimizers and learning rates."""

import pytest
import torch
from torch import nn

from ldm.train import optim


@pytest.mark.parametrize("shape", [(24, 100), (100, 24), (32, 32)])
def test_orthogonal_pulls_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = optim.orthogonal(matrix)
    values = torch.linalg.svdvals(made)
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert torch.cosine_similarity(made.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.parametrize(("name", "lr"), [("adamw", 0.05), ("muon", 0.2)])
def test_an_optimizer_fits_a_line(name: str, lr: float) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(20, 20), torch.randn(64, 20)
    target = x @ torch.randn(20, 20)
    optimizer = optim.make(module, lr, name=name)
    losses = []
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(lr, step, step / 150, warm_up=5, decay="linear")
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_vectors_embeddings_and_narrow_matrices_are_left_to_adam() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(40, 40), "wide": nn.Linear(40, 40)})
    module["narrow"] = nn.Linear(40, 4)
    groups = {
        group["matrix"]: group["params"]
        for group in optim.make(module, 1.0, name="muon").param_groups
    }
    assert [p.shape for p in groups[True]] == [torch.Size([40, 40])]
    assert len(groups[False]) == 4


def test_the_rate_warms_up_and_decays_to_nothing() -> None:
    assert optim.learning_rate(1.0, 0, 0.0, warm_up=10) == pytest.approx(0.1)
    assert optim.learning_rate(1.0, 50, 0.5, warm_up=10, decay="linear") == pytest.approx(0.5)
    assert optim.learning_rate(1.0, 99, 1.0, warm_up=10, decay="cosine") == pytest.approx(0.0)
    assert optim.learning_rate(1.0, 99, 1.0, warm_up=10, decay="constant") == 1.0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer `best`"):
        optim.make(nn.Linear(2, 2), 1.0, name="best")
    with pytest.raises(ValueError, match="unknown decay `best`"):
        optim.learning_rate(1.0, 0, 0.0, decay="best")
