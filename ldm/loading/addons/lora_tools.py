"""Make LoRAs of others: extract them from two models, cut their rank, join several to one.

extract   W_tuned - W_base = U S V;  up = U S, down = V, cut to a rank
resize    up down = U S V, cut likewise
join      up = [w1 up1, w2 up2], down = [down1; down2]: exact, the ranks add up
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.loading.addons.lora import find_base, lora_targets
from ldm.loading.build import build_on_meta, meta_device
from ldm.loading.config import read_yaml
from ldm.loading.convert import LORA_PARTS
from ldm.loading.families import FAMILIES
from ldm.loading.legacy import translate_config
from ldm.loading.matching import match_weights
from ldm.loading.merge import ReadModel, check_fits, read_model
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRA, LoRALayer, Target
from ldm.runtime.errors import ArgumentError, MissingArgument, WeightsMismatch

__all__ = ["Extraction", "RankRule", "extract_lora", "join_loras", "model_of_lora", "resize_lora"]

ZERO = 1e-7  # of singular values, relative to the largest


@dataclass(frozen=True)
class RankRule:
    """How many singular values s of a layer are kept: the fewest that all rules ask for."""

    rank: int | None = None  # at most so many
    share: float | None = None  # so many that their sum is this part of the whole
    square_share: float | None = None  # the same of s squared: 1 - the squared relative error
    ratio: float | None = None  # those that are at least the largest divided by this

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ArgumentError(f"rank {self.rank}: must be at least 1", "rank")
        for name, value in (("share", self.share), ("square_share", self.square_share)):
            if value is not None and not 0 < value <= 1:
                raise ArgumentError(f"{name} {value}: must be above 0 and at most 1", name)
        if self.ratio is not None and not self.ratio >= 1:
            raise ArgumentError(f"ratio {self.ratio}: must be at least 1", "ratio")

    @property
    def is_limited(self) -> bool:
        """Whether any rule is given."""
        return self != RankRule()

    def count(self, values: Tensor) -> int:
        """Return how many of the singular values (n,), which descend, are kept: at least 1."""
        counts = [len(values) if self.rank is None else self.rank]
        for share, numbers in ((self.share, values), (self.square_share, values.square())):
            if share is not None:
                sums = numbers.cumsum(0)
                counts.append(int((sums < share * sums[-1]).sum()) + 1)
        if self.ratio is not None:
            counts.append(int((values >= values[0] / self.ratio).sum()))
        return max(1, min(len(values), *counts))


@dataclass(frozen=True)
class Extraction:
    """A LoRA out of the difference of two models."""

    lora: LoRA
    model: LatentDiffusion
    retained: float  # part of the squared difference of its layers that it has
    left_out: tuple[str, ...]  # weights that differ, too, but are not in the LoRA


@torch.no_grad()
def extract_lora(
    tuned: str | Path,
    base: str | Path,
    rule: RankRule,
    *,
    conv_rule: RankRule | None = None,
    clamp_quantile: float = 0.99,
    ema: bool = False,
    config: str | Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Extraction:
    """Extract a LoRA that makes the model `base` similar to `tuned`, of the same family.

    Layers that do not differ are left out.

    Args:
        rule: Of linear layers and 1 x 1 convolutions.
        conv_rule: Of larger convolutions; None leaves them out.
        clamp_quantile: All numbers of a layer are clamped to this quantile of them; 1 = not at all.
        ema: Use EMA weights, where there are some.
        config: The YAML of both; None finds it.
        progress: Called with the number of layers that are done.

    Raises:
        ValueError: They do not fit each other, or nothing differs.
    """
    if not 0.5 < clamp_quantile <= 1:
        message = f"clamp_quantile {clamp_quantile}: must be above 0.5 and at most 1"
        raise ArgumentError(message, "clamp_quantile")
    models = [read_model(path, config, ema=ema) for path in (tuned, base)]
    check_fits(models[1], models[0])
    differing = _differing_weights(*models)
    networks = [_fill_mapped(model, models[1]) for model in models]
    layers: dict[str, LoRALayer] = {}
    missing = total = 0.0
    for new, old in zip(*map(lora_targets, networks), strict=True):
        progress(1)
        rows = new.target.weight
        used = conv_rule if rows[0, 0].numel() > 1 else rule
        if used is None:
            continue
        delta = rows.float() - old.target.weight.float()
        for model, weight in zip(models, (rows, old.target.weight), strict=True):
            model.release(weight)
        if not delta.any():
            continue
        up, values, down = decompose(delta.flatten(1))
        count = used.count(values)
        up, down = up[:, :count] * values[:count], down[:count]
        if clamp_quantile < 1:
            limit = _quantile(torch.cat([up.flatten(), down.flatten()]), clamp_quantile)
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
        missing += float((delta.flatten(1) - (up @ down).to(delta)).square().sum())
        total += float(delta.square().sum())
        layers[old.kohya] = _build_layer(old.target, up, down)
    if not layers:
        raise WeightsMismatch(f"no layer of `{tuned}` and `{base}` differs that a LoRA can change")
    changed = {layer.target for layer in layers.values()}
    return Extraction(
        LoRA(layers),
        networks[1],
        1 - missing / total,
        tuple(_left_out(differing, networks[1], changed)),
    )


@torch.no_grad()
def resize_lora(
    lora: LoRA, rule: RankRule, *, progress: Callable[[int], object] = lambda count: None
) -> tuple[LoRA, float]:
    """Return the LoRA with fewer ranks, alpha = rank, and the part of the squared sum it keeps."""
    layers, kept, total = {}, 0.0, 0.0
    for name, layer in lora.layers.items():
        up, down = layer.lora_up.weight.flatten(1), layer.lora_down.weight.flatten(1)
        left, r_up = torch.linalg.qr(up.double() * float(layer.scale))
        right, r_down = torch.linalg.qr(down.double().T)
        u, values, v = decompose(r_up @ r_down.T)
        progress(1)
        if not values.any():
            continue
        count = rule.count(values)
        kept += float(values[:count].square().sum())
        total += float(values.square().sum())
        factors = left @ u[:, :count] * values[:count], v[:count] @ right.T
        layers[name] = _build_layer(layer.target, *factors)
    if not layers:
        raise WeightsMismatch("all layers of the LoRA are zero")
    return LoRA(layers), kept / total


@torch.no_grad()
def join_loras(loras: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Return one LoRA that does what all do together, each at its strength; alpha = rank.

    Its rank is the sum of theirs: sums of `up` and of `down` would be another LoRA.
    """
    factors: dict[str, list[tuple[LoRALayer, float]]] = {}
    for lora, strength in loras:
        for name, layer in lora.layers.items():
            factors.setdefault(name, []).append((layer, strength))
    layers = {}
    for name, group in factors.items():
        ups = [
            layer.lora_up.weight.flatten(1).float() * (float(layer.scale) * strength)
            for layer, strength in group
        ]
        downs = [layer.lora_down.weight.flatten(1).float() for layer, _ in group]
        layers[name] = _build_layer(group[0][0].target, torch.cat(ups, 1), torch.cat(downs))
    return LoRA(layers)


def model_of_lora(path: str | Path, base: str | Path | None = None) -> LatentDiffusion:
    """Return a model without weights that has the layers of a LoRA file.

    Args:
        base: Its weights; None recognises SD 1, SD 2, SDXL and its refiner by the file.
    """
    if base is not None:
        return read_model(base, None, ema=False).model
    name = find_base(path)
    family = next((family for family in FAMILIES if family.title == name), None)
    if family is None:
        message = f"`{path}`: the family that the LoRA is for is not known\nhint: pass a model"
        raise MissingArgument(message, "model")
    model = build_on_meta(translate_config(read_yaml(family.config_path(None))))
    assert isinstance(model, LatentDiffusion)
    return model


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition U (m, k), S (k,), V (k, n), in float64.

    By the eigenvectors of the smaller product with itself: as exact as weights in float32 are, and
    several times as fast for the long rows of convolutions.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        u, values, v = decompose(matrix.T)
        return v.T, values, u.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, u = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    is_zero = values <= ZERO * values[0]
    values = values.masked_fill(is_zero, 0)
    v = u.T @ matrix / values.masked_fill(is_zero, 1)[:, None]
    return u, values, v.masked_fill(is_zero[:, None], 0)


def _fill_mapped(model: ReadModel, base: ReadModel) -> LatentDiffusion:
    """Return the model with the weights that LoRAs change, as pages of files.

    A file of a UNet alone goes with the text encoders of the base.
    """
    names = [name for name in {**base.names, **model.names} if name.startswith(LORA_PARTS)]
    state = {name: (model if name in model else base)[name] for name in names}
    network = model.model
    others = {n: v for n, v in network.state_dict().items() if not n.startswith(LORA_PARTS)}
    state = match_weights(network, state | others, model.file.path)
    network.load_state_dict(state, assign=True)
    return network


def _differing_weights(tuned: ReadModel, base: ReadModel) -> list[str]:
    names = [name for name in base.names if name in tuned and base[name].is_floating_point()]
    return [name for name in names if not _is_same(tuned, base, name)]


def _is_same(tuned: ReadModel, base: ReadModel, name: str) -> bool:
    new, old = tuned[name], base[name]
    is_same = new.shape == old.shape and new.float().equal(old.float())
    tuned.release(new)
    base.release(old)
    return is_same


def _left_out(names: Iterable[str], model: LatentDiffusion, targets: set[Target]) -> Iterable[str]:
    """Yield the weights that are not changed by any of these targets."""
    changed = {
        (id(target.layer), f"in_proj_{target.name}" if target.part is not None else target.name)
        for target in targets
    }
    parameters = {
        f"{prefix}.{name}": (id(module), name)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    return (name for name in names if parameters.get(name) not in changed)


def _quantile(values: Tensor, share: float) -> float:
    """Return a quantile as `torch.quantile` does, which takes 16 million numbers at most."""
    place = share * (len(values) - 1)
    below = values.kthvalue(int(place) + 1).values
    above = values.kthvalue(min(int(place) + 2, len(values))).values
    return float(below.lerp(above, place - int(place)))


def _build_layer(target: Target, up: Tensor, down: Tensor) -> LoRALayer:
    with meta_device():
        layer = LoRALayer(target, rank=len(down))
    state = {
        "lora_down.weight": down.float().reshape(layer.lora_down.weight.shape),
        "lora_up.weight": up.float().reshape(layer.lora_up.weight.shape),
        "alpha": torch.tensor(float(len(down))),
    }
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)
