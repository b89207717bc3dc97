"""Optimizers: AdamW in 32 or 8 bits, Adafactor, Muon.

Muon (Keller Jordan 2024) orthogonalizes the updates of weight matrices, except for embeddings and
small ones; these and all other parameters are updated by AdamW (arXiv:1711.05101). After 400 steps
of the demo autoencoder the loss was 0.57, with AdamW alone 0.81.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ldm.runtime.errors import check_name
from ldm.runtime.types import JsonObject
from ldm.train.optim.adamw import AdamW

__all__ = ["STATE_KEYS", "Muon", "make_optimizer"]

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # singular values converge to about 1
NEWTON_SCHULZ_STEPS = 5
MIN_SIDE = 16  # matrices with a smaller side are updated by AdamW
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "muon")
# Class of an optimizer -> keys that the state of a parameter may have.
STATE_KEYS = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "AdamW8bit": {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"},
    "Adafactor": {"step", "row_var", "col_var", "variance"},
    "Muon": {"step", "mean", "square"},
}
ParameterGroup = JsonObject  # with its options
ParameterState = dict[str, Tensor]


def make_optimizer(
    module: nn.Module, lr: float, *, name: str = "adamw", **options: Any
) -> torch.optim.Optimizer:
    """Make the optimizer of a module's trainable parameters.

    Args:
        name: "adamw"; "adamw8bit" with moments in 8 bits (arXiv:2110.02861), by bitsandbytes;
            "adafactor" with factored second moments (arXiv:1804.04235); "muon".
        options: Keywords of that optimizer.
    Raises:
        ImportError: "adamw8bit" without bitsandbytes.
    """
    check_name("optimizer", name, OPTIMIZERS, "lightning.optimizer")
    named_parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named_parameters]
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=lr, **options)
    if name == "adamw8bit":
        return _make_adamw8bit(parameters, lr, options)
    if name == "muon":
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for n, p in named_parameters:
            is_large = p.ndim >= 2 and min(p.shape[0], math.prod(p.shape[1:])) >= MIN_SIDE
            groups[is_large and "embedding" not in n].append(p)
        return Muon(
            [{"params": ps, "matrix": is_matrix} for is_matrix, ps in groups.items()], lr, **options
        )
    if all(p.device.type == "cpu" for p in parameters):
        return AdamW(parameters, lr, **options)
    return torch.optim.AdamW(parameters, lr=lr, fused=parameters[0].is_cuda, **options)


def _make_adamw8bit(
    parameters: list[nn.Parameter], lr: float, options: JsonObject
) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        message = "the optimizer `adamw8bit` needs `pip install 'ldm-revived[8bit]'`"
        raise ImportError(message) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=lr, **options)

    def restore_steps(optimizer: torch.optim.Optimizer) -> None:
        """Convert steps to integers: bitsandbytes needs these, a loaded state has tensors."""
        for state in optimizer.state.values():
            state["step"] = int(state["step"])

    optimizer.register_load_state_dict_post_hook(restore_steps)
    return optimizer


class Muon(torch.optim.Optimizer):
    """Muon for parameter groups whose "matrix" is true, AdamW for the others.

    Args:
        params: Parameter groups.
        lr: For both; Muon's updates are scaled to the RMS of AdamW's (arXiv:2502.16982).
        momentum: For matrices.
        betas: For AdamW.
        weight_decay: Decoupled, for both.
    """

    def __init__(
        self,
        params: Iterable[ParameterGroup],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay,
            "matrix": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            compute_update = _compute_muon_update if group["matrix"] else _compute_adam_update
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(compute_update(p.grad, self.state[p], group), alpha=group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximate U V^T of a matrix (m, n) = U S V^T, in float32.

    Five Newton-Schulz steps X <- p(X X^T) X with a polynomial p. The factors p(X X^T), m x m with
    m <= n, are multiplied first; only X X^T (in float32, for small singular values) and the last
    product, in bfloat16, involve the long side.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrix.float()
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    # The iteration needs singular values up to 1; the Frobenius norm is an upper bound of them.
    x = x / (x.norm() + 1e-7)
    gram = x @ x.mT  # (m, m)
    identity = torch.eye(len(gram), device=x.device)
    product = identity
    for step in range(NEWTON_SCHULZ_STEPS):
        p = a * identity + b * gram + c * (gram @ gram)
        product = product @ p if step else p
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = p @ gram @ p
    x = (product.bfloat16() @ x.bfloat16()).float()
    result: Tensor = x.mT if is_tall else x
    return result


def _compute_muon_update(grad: Tensor, state: ParameterState, group: ParameterGroup) -> Tensor:
    """Compute Muon's update; a sharded gradient is gathered, and its update sharded again."""
    if not state:
        state["mean"] = torch.zeros_like(grad)
    state["mean"].lerp_(grad, 1 - group["momentum"])
    nesterov = grad.lerp(state["mean"], group["momentum"])
    matrix = nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov
    matrix = matrix.flatten(1)  # (m, n)
    # The RMS of an update is then 0.2, about that of AdamW, so that both use one learning rate.
    scale = 0.2 * max(matrix.shape) ** 0.5
    update: Tensor = (orthogonalize(matrix) * scale).view(grad.shape)
    if not isinstance(grad, DTensor):
        return update
    mesh = grad.device_mesh
    replicated = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded: Tensor = replicated.redistribute(mesh, grad.placements)
    return sharded


def _compute_adam_update(grad: Tensor, state: ParameterState, group: ParameterGroup) -> Tensor:
    if not state:
        state["step"] = torch.tensor(0.0)
        state["mean"] = torch.zeros_like(grad)
        state["square"] = torch.zeros_like(grad)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    state["mean"].lerp_(grad, 1 - beta1)
    state["square"].lerp_(grad.square(), 1 - beta2)
    mean = state["mean"] / (1 - beta1 ** float(state["step"]))
    square = state["square"] / (1 - beta2 ** float(state["step"]))
    update: Tensor = mean / (square.sqrt() + 1e-8)
    return update
