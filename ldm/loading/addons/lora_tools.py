"""Extract LoRAs from two models, join several into one, or reduce their rank.

extract   W_tuned - W_base = U S Vh;  up = U S, down = Vh, truncated to a rank
join      up = [w1 up1, w2 up2], down = [down1; down2]: exact, the ranks add up; then truncated
          LyCORIS (LoHa, LoKr, Tucker LoCon, differences): w1 delta1 + w2 delta2 = U S Vh
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.loading.addons.lora import build_lora_layer, read_weight_changes
from ldm.loading.addons.lora_files import guess_family_of_lora, read_bundled_embeddings
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.addons.lora_weights import LoRAWeightLike
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.convert import fill_lora_components
from ldm.loading.families import FAMILIES
from ldm.loading.merge import ModelFile, check_compatible, read_model_file
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRA, LoRALayer, Target, WeightDelta, sum_deltas
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingArgument, WeightsMismatch

__all__ = [
    "NO_LIMITS", "ExtractedLoRA", "JoinedLoRA", "RankLimits", "build_model_for_lora", "compute_svd",
    "extract_lora", "join_loras",
]  # fmt: skip

SVD_RTOL = 1e-7  # singular values below this, relative to the largest, are set to 0


@dataclass(frozen=True)
class RankLimits:
    """Limits for the singular values that a layer keeps: the strictest applies; None = no limit.

    Args:
        rank: Maximum number of singular values.
        sum_fraction: Fraction of their sum to keep, above 0 to 1 (kohya's `sv_cumulative`).
        square_fraction: Fraction of the sum of their squares to keep, above 0 to 1: 1 - squared
            relative error (kohya's `sv_fro`).
        ratio: Largest / smallest value to keep, at least 1 (kohya's `sv_ratio`).
    """

    rank: int | None = None
    sum_fraction: float | None = None
    square_fraction: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ArgumentError(f"rank {self.rank}: must be at least 1", "rank")
        for name, value in (
            ("sum_fraction", self.sum_fraction),
            ("square_fraction", self.square_fraction),
        ):
            if value is not None and not 0 < value <= 1:
                raise ArgumentError(f"{name} {value}: must be above 0 and at most 1", name)
        if self.ratio is not None and not self.ratio >= 1:
            raise ArgumentError(f"ratio {self.ratio}: must be at least 1", "ratio")

    def count_kept(self, s: Tensor) -> int:
        """Return how many of n singular values (n,), descending, to keep: at least 1 if n > 0."""
        if not len(s):
            return 0
        counts = [len(s) if self.rank is None else self.rank]
        for fraction, terms in ((self.sum_fraction, s), (self.square_fraction, s.square())):
            if fraction is not None:
                sums = terms.cumsum(0)
                counts.append(int((sums < fraction * sums[-1]).sum()) + 1)
        if self.ratio is not None:
            counts.append(int((s >= s[0] / self.ratio).sum()))
        return max(1, min(len(s), *counts))


NO_LIMITS = RankLimits()


@dataclass(frozen=True)
class JoinedLoRA:
    """Several LoRAs joined into one.

    Args:
        lora: The layers.
        other_tensors: Other tensors by name in files: deltas of norms and biases, textual
            inversions.
        total_rank: Sum of the layers' ranks before limits.
        retained_fraction: Fraction of the sum of squared singular values that the limits keep.
    """

    lora: LoRA
    other_tensors: dict[str, Tensor]
    total_rank: int
    retained_fraction: float


@dataclass(frozen=True)
class ExtractedLoRA:
    """A LoRA extracted from the difference of two models.

    Args:
        lora: The layers.
        model: The base model; only its UNet and text encoders are loaded.
        retained_fraction: Fraction of the sum of squared differences that the LoRA reproduces.
        other_weights: Names of weights that differ between the models, but are not in the LoRA.
    """

    lora: LoRA
    model: LatentDiffusion
    retained_fraction: float
    other_weights: tuple[str, ...]


@torch.no_grad()
def extract_lora(
    tuned: str | Path,
    base: str | Path,
    limits: RankLimits,
    *,
    conv_limits: RankLimits | None = None,
    clamp_quantile: float = 0.99,
    ema: bool = False,
    config: str | Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> ExtractedLoRA:
    """Extract a LoRA that approximates the difference of `tuned` from `base`, of the same family.

    Layers that do not differ are left out.

    Args:
        limits: Limits for linear layers and 1 x 1 convolutions.
        conv_limits: Limits for larger convolutions; None = these are left out.
        clamp_quantile: Quantile to which the weights of a layer are clamped; 1 = not clamped.
        ema: Whether to use EMA weights of files that have them.
        config: The YAML of both models; None finds it as `load` does.
        progress: Called with 1 for each layer.

    Raises:
        ValueError: The models do not fit each other, or do not differ.
    """
    if not 0.5 < clamp_quantile <= 1:
        message = f"clamp_quantile {clamp_quantile}: must be above 0.5 and at most 1"
        raise ArgumentError(message, "clamp_quantile")
    tuned_file, base_file = (read_model_file(path, config, ema=ema) for path in (tuned, base))
    check_compatible(base_file, tuned_file)
    differing = _list_differing_weights(tuned_file, base_file)
    models = [_fill_memory_mapped(file, base_file) for file in (tuned_file, base_file)]
    layers: dict[str, LoRALayer] = {}
    squared_error = squared_delta = 0.0
    for tuned_layer, base_layer in zip(*map(list_lora_targets, models), strict=True):
        progress(1)
        tuned_weight, base_weight = tuned_layer.target.weight, base_layer.target.weight
        layer_limits = conv_limits if base_weight[0, 0].numel() > 1 else limits
        if layer_limits is None:
            continue
        delta = tuned_weight.float() - base_weight.float()
        tuned_file.release(tuned_weight)
        base_file.release(base_weight)
        if not delta.any():
            continue
        u, s, vh = compute_svd(delta.flatten(1))
        rank = layer_limits.count_kept(s)
        up, down = u[:, :rank] * s[:rank], vh[:rank]
        if clamp_quantile < 1:
            limit = _compute_quantile(torch.cat([up.flatten(), down.flatten()]), clamp_quantile)
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
        squared_error += float((delta.flatten(1) - (up @ down).to(delta)).square().sum())
        squared_delta += float(delta.square().sum())
        layer = build_lora_layer(base_layer.target, down.float(), up.float())
        layers[base_layer.kohya_name] = layer
    if not layers:
        raise WeightsMismatch(f"no layer of `{tuned}` and `{base}` differs that a LoRA can change")
    targets = [layer.target for layer in layers.values()]
    changed_ids = {id(target.layer.get_parameter(target.parameter_name)) for target in targets}
    base_model = models[-1]
    changed = {name for name, value in base_model.named_parameters() if id(value) in changed_ids}
    others = tuple(name for name in differing if name not in changed)
    return ExtractedLoRA(LoRA(layers), base_model, 1 - squared_error / squared_delta, others)


@torch.no_grad()
def join_loras(
    files: Iterable[tuple[str | Path, LoRAWeightLike]],
    model: LatentDiffusion,
    limits: RankLimits = NO_LIMITS,
    *,
    progress: Callable[[int], object] = lambda count: None,
) -> JoinedLoRA:
    """Join (file, weight) pairs into one LoRA with the effect of all of them; alpha = rank.

    The ranks of plain LoRAs add up, as their matrices are concatenated: adding `up` and `down`
    would not be exact. Other deltas, of LyCORIS, are summed per layer and decomposed.

    Args:
        model: Model whose layers they change; it may be on the meta device.
        limits: Limits of each layer's rank; they do not apply to deltas of norms and biases.
        progress: Called with 1 for each layer.

    Raises:
        FileFormatError: A file scales or rotates weights, which a LoRA cannot do.
        ValueError: As `read_weight_changes`.
    """
    names: dict[Target, str] = {}
    deltas: dict[Target, list[WeightDelta]] = {}
    other_tensors: dict[str, Tensor] = {}
    for path, weight in files:
        for name, change in read_weight_changes(path, model, weight):
            if not isinstance(change, WeightDelta):
                raise FileFormatError(
                    f"`{path}` scales or rotates weights (DoRA, (IA)^3, GLoRA, OFT, BOFT), which "
                    "a LoRA cannot do: merge it into a checkpoint with `convert`, then extract a "
                    "LoRA of the difference with `extract-lora`"
                )
            names[change.target] = name
            deltas.setdefault(change.target, []).append(change)
        other_tensors |= read_bundled_embeddings(path)
    layers: dict[str, LoRALayer] = {}
    total_rank, retained_squares, total_squares = 0, 0.0, 0.0
    for target, target_deltas in deltas.items():
        progress(1)
        if target.weight.dim() == 1:
            name = f"{names[target]}.{_get_1d_role(target)}"
            other_tensors[name] = sum_deltas(target_deltas)
            continue
        u, s, vh = _decompose_sum(target_deltas, is_limited=limits != NO_LIMITS)
        rank = min(limits.count_kept(s), int(s.count_nonzero()))
        if rank:
            up, down = u[:, :rank] * s[:rank], vh[:rank]
            layers[names[target]] = build_lora_layer(target, down.float(), up.float())
        total_rank += len(s)
        retained_squares += float(s[:rank].square().sum())
        total_squares += float(s.square().sum())
    if not layers and not other_tensors:
        raise WeightsMismatch("all layers of the LoRA are zero")
    retained_fraction = retained_squares / total_squares if total_squares else 1.0
    return JoinedLoRA(LoRA(layers), other_tensors, total_rank, retained_fraction)


def build_model_for_lora(path: str | Path, base: str | Path | None = None) -> LatentDiffusion:
    """Return the model that a LoRA file is for, on the meta device.

    Args:
        base: Checkpoint of the model; None = recognize SD 1, SD 2, SDXL or its refiner by the LoRA.
    """
    if base is not None:
        return read_model_file(base, None, ema=False).model
    name = guess_family_of_lora(path)
    family = next((family for family in FAMILIES if family.title == name), None)
    if family is None:
        message = f"`{path}`: the family of the LoRA is not recognized\nhint: pass a model"
        raise MissingArgument(message, "model")
    model = build_on_meta(read_yaml(family.get_config_path(None)))
    assert isinstance(model, LatentDiffusion)
    return model


def compute_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the singular value decomposition U (m, k), S (k,), Vh (k, n), in float64.

    Uses the eigenvectors of A A^T or A^T A, the smaller one: exact enough for float32 weights, and
    several times as fast as `torch.linalg.svd` for the long rows of convolutions.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = compute_svd(matrix.T)
        return vh.T, s, u.T
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix @ matrix.T)
    s, u = eigenvalues.flip(0).clamp(min=0).sqrt(), eigenvectors.flip(1)
    is_zero = s <= SVD_RTOL * s[0]
    s = s.masked_fill(is_zero, 0)
    vh = u.T @ matrix / s.masked_fill(is_zero, 1)[:, None]
    return u, s, vh.masked_fill(is_zero[:, None], 0)


def _decompose_sum(
    deltas: Sequence[WeightDelta], *, is_limited: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,), Vh (k, n) whose product is the sum of the deltas.

    Plain LoRAs are decomposed only if ranks are limited; else S is 1.
    """
    plain = [delta for delta in deltas if isinstance(delta, LoRALayer)]
    if len(plain) < len(deltas):
        u, s, vh = compute_svd(sum_deltas(deltas).flatten(1))
        rank = int(s.count_nonzero())
        return u[:, :rank], s[:rank], vh[:rank]
    up = torch.cat([a.lora_up.weight.flatten(1).double() * float(a.scale) for a in plain], 1)
    down = torch.cat([a.lora_down.weight.flatten(1).double() for a in plain])
    if not is_limited:
        return up, torch.ones(len(down)), down
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = compute_svd(r_up @ r_down.T)
    return q_up @ u, s, vh @ q_down.T


def _get_1d_role(target: Target) -> str:
    """Return the role in files of the delta of a bias, or of the weight of a norm."""
    if not isinstance(target.layer, (nn.GroupNorm, nn.LayerNorm)):
        return "diff_b"
    return "w_norm" if target.name == "weight" else "b_norm"


def _fill_memory_mapped(file: ModelFile, base: ModelFile) -> LatentDiffusion:
    """Return the model of a file with UNet and text encoders, memory-mapped.

    Text encoders that the file does not contain are taken from the base.
    """
    names = base.names.keys() | file.names.keys()
    state = {name: (file if name in file else base)[name] for name in names}
    fill_lora_components(file.model, state, file.checkpoint.path)
    return file.model


def _list_differing_weights(tuned: ModelFile, base: ModelFile) -> list[str]:
    names = []
    for name in base.names:
        if name in tuned and base[name].is_floating_point():
            if not tuned[name].float().equal(base[name].float()):
                names.append(name)
            for model in (tuned, base):
                model.release(model[name])
    return names


def _compute_quantile(values: Tensor, q: float) -> float:
    """Compute a quantile as `torch.quantile`, which is limited to 16 million numbers."""
    position = q * (len(values) - 1)
    below = values.kthvalue(int(position) + 1).values
    above = values.kthvalue(min(int(position) + 2, len(values))).values
    return float(below.lerp(above, position - int(position)))
