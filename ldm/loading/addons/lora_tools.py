"""Extract LoRAs from two models, join several into one, or reduce their rank.

extract   W_tuned - W_base = U S V;  up = U S, down = V, cut to a rank
join      up = [w1 up1, w2 up2], down = [down1; down2]: exact, the ranks add up; then cut as above
          LyCORIS (LoHa, LoKr, Tucker LoCon, differences): w1 delta1 + w2 delta2 = U S V
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.loading.addons.lora import build_lora_layer, read_changes
from ldm.loading.addons.lora_files import find_lora_family, read_bundled_embeddings
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.addons.lora_weights import LoRAWeightLike
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.convert import fill_lora_parts
from ldm.loading.families import FAMILIES
from ldm.loading.merge import ModelFile, check_compatible, read_model_file
from ldm.model import LatentDiffusion
from ldm.nets.lora import Addition, LoRA, LoRALayer, Target, sum_additions
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingArgument, WeightsMismatch

__all__ = [
    "ExtractedLoRA", "JoinedLoRA", "RankLimits", "build_model_of_lora", "compute_svd",
    "extract_lora", "join_loras",
]  # fmt: skip

ROUNDING_ERROR = 1e-7  # of singular values, relative to the largest


@dataclass(frozen=True)
class RankLimits:
    """Limits for the singular values that a layer keeps: the strictest applies; None = no limit.

    Args:
        rank: Maximum number of values.
        sum_fraction: Fraction of their sum to keep, above 0 to 1 (kohya's `sv_cumulative`).
        square_fraction: Fraction of the sum of their squares to keep, above 0 to 1: 1 - squared
            relative error (kohya's `sv_fro`).
        ratio: Keep values of at least the largest divided by this, at least 1 (kohya's `sv_ratio`).
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

    @property
    def is_limited(self) -> bool:
        """Whether any limit is set."""
        return self != NO_LIMITS

    def count_kept(self, values: Tensor) -> int:
        """Return the number of singular values (n,), descending, to keep: at least 1."""
        counts = [len(values) if self.rank is None else self.rank]
        for fraction, terms in (
            (self.sum_fraction, values),
            (self.square_fraction, values.square()),
        ):
            if fraction is not None:
                sums = terms.cumsum(0)
                counts.append(int((sums < fraction * sums[-1]).sum()) + 1)
        if self.ratio is not None:
            counts.append(int((values >= values[0] / self.ratio).sum()))
        return max(1, min(len(values), *counts))


NO_LIMITS = RankLimits()


@dataclass(frozen=True)
class JoinedLoRA:
    """Several LoRAs joined into one.

    Args:
        lora: The layers.
        other_tensors: Tensors by their names in files: additions to norms and biases, textual
            inversions.
        total_rank: Sum of the layers' ranks before they were limited.
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
        model: The base model; only the weights that LoRAs change are loaded.
        retained_fraction: Fraction of the squared difference of the layers that it reproduces.
        other_weights: Names of other weights that differ between the models.
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
        clamp_quantile: Quantile to which the weights of a layer are clamped; 1 = no clamping.
        ema: Whether to use EMA weights of files that have them.
        config: The YAML of both models; None finds it as `load` does.
        progress: Called with 1 for each layer.

    Raises:
        ValueError: The models do not fit each other, or do not differ.
    """
    if not 0.5 < clamp_quantile <= 1:
        message = f"clamp_quantile {clamp_quantile}: must be above 0.5 and at most 1"
        raise ArgumentError(message, "clamp_quantile")
    models = [read_model_file(path, config, ema=ema) for path in (tuned, base)]
    check_compatible(models[1], models[0])
    differing = _list_differing_weights(*models)
    networks = [_fill_mapped(model, models[1]) for model in models]
    layers: dict[str, LoRALayer] = {}
    squared_error = squared_delta = 0.0
    for new, old in zip(*map(list_lora_targets, networks), strict=True):
        progress(1)
        weights = (new.target.weight, old.target.weight)
        layer_limits = conv_limits if weights[0][0, 0].numel() > 1 else limits
        if layer_limits is None:
            continue
        delta = weights[0].float() - weights[1].float()
        for model, weight in zip(models, weights, strict=True):
            model.release(weight)
        if not delta.any():
            continue
        up, values, down = compute_svd(delta.flatten(1))
        count = layer_limits.count_kept(values)
        up, down = up[:, :count] * values[:count], down[:count]
        if clamp_quantile < 1:
            limit = _compute_quantile(torch.cat([up.flatten(), down.flatten()]), clamp_quantile)
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
        squared_error += float((delta.flatten(1) - (up @ down).to(delta)).square().sum())
        squared_delta += float(delta.square().sum())
        layers[old.kohya_name] = build_lora_layer(old.target, down.float(), up.float())
    if not layers:
        raise WeightsMismatch(f"no layer of `{tuned}` and `{base}` differs that a LoRA can change")
    targets = [layer.target for layer in layers.values()]
    changed = {id(target.layer.get_parameter(target.parameter_name)) for target in targets}
    names = {name for name, value in networks[1].named_parameters() if id(value) in changed}
    others = tuple(name for name in differing if name not in names)
    return ExtractedLoRA(LoRA(layers), networks[1], 1 - squared_error / squared_delta, others)


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
    would not be exact. Other additions, of LyCORIS, are summed per layer and decomposed.

    Args:
        model: Model whose layers they change; it may be on the meta device.
        limits: Limits of each layer's rank; additions to norms and biases stay whole.
        progress: Called with 1 for each layer.

    Raises:
        FileFormatError: A file scales or rotates weights, which a LoRA cannot do.
        ValueError: As `read_changes`.
    """
    names: dict[Target, str] = {}
    additions: dict[Target, list[Addition]] = {}
    other_tensors: dict[str, Tensor] = {}
    for path, weight in files:
        for name, change in read_changes(path, model, weight):
            if not isinstance(change, Addition):
                raise FileFormatError(
                    f"`{path}` scales or rotates weights (DoRA, (IA)^3, GLoRA, OFT, BOFT), which "
                    "a LoRA cannot do: merge it into a checkpoint with `convert`, then extract a "
                    "LoRA of the difference with `extract-lora`"
                )
            names[change.target] = name
            additions.setdefault(change.target, []).append(change)
        other_tensors |= read_bundled_embeddings(path)
    layers: dict[str, LoRALayer] = {}
    total_rank, retained, total = 0, 0.0, 0.0
    for target, target_additions in additions.items():
        progress(1)
        if target.weight.dim() == 1:
            name = f"{names[target]}.{_get_vector_role(target)}"
            other_tensors[name] = sum_additions(target_additions)
            continue
        up, values, down = _decompose_sum(target_additions, is_limited=limits.is_limited)
        count = min(limits.count_kept(values), int(values.count_nonzero()))
        if count:
            up, down = up[:, :count] * values[:count], down[:count]
            layers[names[target]] = build_lora_layer(target, down.float(), up.float())
        total_rank += len(values)
        retained += float(values[:count].square().sum())
        total += float(values.square().sum())
    if not layers and not other_tensors:
        raise WeightsMismatch("all layers of the LoRA are zero")
    return JoinedLoRA(LoRA(layers), other_tensors, total_rank, retained / total if total else 1.0)


def build_model_of_lora(path: str | Path, base: str | Path | None = None) -> LatentDiffusion:
    """Return the model that a LoRA file is for, on the meta device.

    Args:
        base: Checkpoint of the model; None recognises SD 1, SD 2, SDXL and its refiner by the
            LoRA.
    """
    if base is not None:
        return read_model_file(base, None, ema=False).model
    name = find_lora_family(path)
    family = next((family for family in FAMILIES if family.title == name), None)
    if family is None:
        message = f"`{path}`: the family of the LoRA is not recognised\nhint: pass a model"
        raise MissingArgument(message, "model")
    model = build_on_meta(read_yaml(family.get_config_path(None)))
    assert isinstance(model, LatentDiffusion)
    return model


def compute_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the singular value decomposition U (m, k), S (k,), V (k, n), in float64.

    Uses the eigenvectors of A A^T or A^T A, the smaller one: exact enough for float32 weights, and
    several times as fast as `torch.linalg.svd` for the long rows of convolutions.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        u, values, v = compute_svd(matrix.T)
        return v.T, values, u.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, u = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    is_zero = values <= ROUNDING_ERROR * values[0]
    values = values.masked_fill(is_zero, 0)
    v = u.T @ matrix / values.masked_fill(is_zero, 1)[:, None]
    return u, values, v.masked_fill(is_zero[:, None], 0)


def _decompose_sum(
    additions: Sequence[Addition], *, is_limited: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,), V (k, n) whose product is the sum of the additions.

    Plain LoRAs are decomposed only if ranks are limited; else S is 1.
    """
    plain = [addition for addition in additions if isinstance(addition, LoRALayer)]
    if len(plain) < len(additions):
        u, values, v = compute_svd(sum_additions(additions).flatten(1))
        count = int(values.count_nonzero())
        return u[:, :count], values[:count], v[:count]
    up = torch.cat([a.lora_up.weight.flatten(1).double() * float(a.scale) for a in plain], 1)
    down = torch.cat([a.lora_down.weight.flatten(1).double() for a in plain])
    if not is_limited:
        return up, torch.ones(len(down)), down
    left, r_up = torch.linalg.qr(up)
    right, r_down = torch.linalg.qr(down.T)
    u, values, v = compute_svd(r_up @ r_down.T)
    return left @ u, values, v @ right.T


def _get_vector_role(target: Target) -> str:
    """Return the name in files for an addition to a bias, or to the weight of a norm."""
    if not isinstance(target.layer, (nn.GroupNorm, nn.LayerNorm)):
        return "diff_b"
    return "w_norm" if target.name == "weight" else "b_norm"


def _fill_mapped(model: ModelFile, base: ModelFile) -> LatentDiffusion:
    """Return the model with the weights that LoRAs change, memory-mapped.

    Text encoders that its file does not contain are taken from the base.
    """
    names = base.names.keys() | model.names.keys()
    state = {name: (model if name in model else base)[name] for name in names}
    fill_lora_parts(model.model, state, model.file.path)
    return model.model


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
    """Compute a quantile like `torch.quantile`, which is limited to 16 million numbers."""
    position = q * (len(values) - 1)
    below = values.kthvalue(int(position) + 1).values
    above = values.kthvalue(min(int(position) + 2, len(values))).values
    return float(below.lerp(above, position - int(position)))
