"""LyCORIS adapters other than plain LoRA, to be merged into weights.

    LoCon, Tucker form   W + s up mid down                    arXiv:2309.14859
    LoHa                 W + s (a1 b1) * (a2 b2)              arXiv:2108.06098
    LoKr                 W + s w1 (x) w2                      arXiv:2212.10650
    difference, norm     W + w diff                           full-rank difference
    DoRA                 m V / |V|,  V = W + one of these     arXiv:2402.09353
    (IA)^3               W (1 + w v)                          arXiv:2205.05638
    GLoRA                W + s (W a1 a2 + b1 b2)              arXiv:2306.07967
    OFT, BOFT            R W, R block-wise orthogonal         arXiv:2306.07280, arXiv:2311.06243

Here s = w alpha / rank, w is the user's strength, and (x) the Kronecker product. For OFT and BOFT,
w applies to the result, W + w (R W - W); in lycoris-lora, it applies to each stage of BOFT.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ldm.nets.lora import Target, WeightChange, WeightDelta

__all__ = ["Adapter", "build_change", "find_rank", "is_adapter"]

DORA_EPS = torch.finfo(torch.float32).eps  # added to the norms of DoRA, as in lycoris-lora
COFT_EPS = 1e-8  # added to the norm of constrained OFT, as in lycoris-lora
# Names of tensors
GLORA_NAMES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
PEFT_MAGNITUDE = "magnitude"  # of DoRA, one per row of the weight
MAGNITUDE_NAMES = ("dora_scale", PEFT_MAGNITUDE)
DIFFERENCE_NAMES = ("diff", "diff_b", "w_norm", "b_norm")
RANK_NAMES = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "b2.weight")  # of shape (rank, …)
# (r, r, kh, kw), (r, out), (r, in) -> (out, in, kh, kw)
TUCKER_EQUATION = "ijkl,io,jn->onkl"


@dataclass(frozen=True, eq=False)
class Adapter:
    """The tensors of an adapter for one layer.

    Args:
        tensors: By name in the file, without the layer's name.
        alpha: Scale relative to the rank; None if the file has none.
        on_input: Whether (IA)^3 scales the columns (inputs) of the weight, instead of the rows.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    on_input: bool = False

    @property
    def scale(self) -> float:
        """The factor alpha / rank; 1 if there is no rank or alpha."""
        rank = find_rank(self.tensors)
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].float()


DeltaFunction = Callable[[Adapter, torch.Size], Tensor]
TransformFunction = Callable[[Adapter, Tensor], Tensor]


def find_rank(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank of a layer's low-rank product; None if the layer has none."""
    return next((len(tensors[name]) for name in RANK_NAMES if name in tensors), None)


def build_change(target: Target, adapter: Adapter, strength: float = 1.0) -> WeightChange:
    """Build the change for the adapter type that the names of the tensors imply.

    Raises:
        ValueError: Tensors are missing or unknown, or their shapes do not fit the weight.
    """
    adapter_type = _find_adapter_type(adapter.tensors)
    if adapter_type is None:
        names = ", ".join(f"`{name}`" for name in adapter.tensors)
        raise ValueError(f"no type of adapter has the tensors {names}")
    try:
        shape = target.weight.shape
    except AttributeError as error:
        raise ValueError(f"the layer has no {target.name}") from error
    # Only shapes are computed, to find those that do not fit before any weight is changed.
    meta_tensors = {name: value.to("meta") for name, value in adapter.tensors.items()}
    meta_change = _build_unchecked(
        adapter_type, target, replace(adapter, tensors=meta_tensors), strength
    )
    try:
        meta_change.change_weight(torch.empty(shape, device="meta"))
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"its tensors do not fit a weight of shape {tuple(shape)}") from error
    return _build_unchecked(adapter_type, target, adapter, strength)


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether tensors with these names, as in `Adapter`, form a complete adapter."""
    return _find_adapter_type(names) is not None


def _find_adapter_type(names: Iterable[str]) -> "_AdapterType | None":
    names = set(names) - set(MAGNITUDE_NAMES)
    return next((each for each in ADAPTER_TYPES if each.matches(names)), None)


def _build_unchecked(
    adapter_type: "_AdapterType", target: Target, adapter: Adapter, strength: float
) -> WeightChange:
    change = adapter_type.build(target, adapter, strength)
    magnitude = next((adapter.tensors[name] for name in MAGNITUDE_NAMES if name in adapter), None)
    if magnitude is None:
        return change
    if not isinstance(change, WeightDelta):
        raise ValueError(
            "its magnitudes (DoRA) need the tensors of LoRA, LoHa, LoKr or a difference"
        )
    if PEFT_MAGNITUDE in adapter:
        magnitude = magnitude.reshape(-1, 1)
    return _DoRA(target, change, magnitude, strength)


@dataclass(eq=False)
class _AdapterDelta(WeightDelta):
    """W + w delta."""

    compute: DeltaFunction
    target: Target
    adapter: Adapter
    strength: float

    def compute_delta(self) -> Tensor:
        shape = self.target.weight.shape
        delta = self.compute(self.adapter, shape)
        if len(delta) != shape[0]:
            raise ValueError(f"its delta has shape {tuple(delta.shape)}, the weight {tuple(shape)}")
        return self.strength * self.adapter.scale * delta.reshape(shape)


@dataclass(eq=False)
class _WeightTransform(WeightChange):
    """W + w (f(W) - W), for changes that are a function of the weight."""

    transform: TransformFunction
    target: Target
    adapter: Adapter
    strength: float

    def change_weight(self, weight: Tensor) -> Tensor:
        new_weight = self.transform(self.adapter, weight).reshape(weight.shape)
        return weight + self.strength * (new_weight - weight)


@dataclass(eq=False)
class _DoRA(WeightChange):
    """DoRA: the sum V of weight and delta, with rows or columns rescaled to magnitudes m.

    m is (out, 1, …) for rows, or (1, in, 1, …) for columns, as in older files. At strength w the
    norms become (1 - w) |V| + w m.
    """

    target: Target
    delta: WeightDelta
    magnitude: Tensor
    strength: float

    def change_weight(self, weight: Tensor) -> Tensor:
        direction = self.delta.change_weight(weight)
        magnitude = self.magnitude.float().to(weight.device)
        axis = 1 if len(magnitude) == 1 and len(weight) != 1 else 0
        other_axes = [dim for dim in range(weight.dim()) if dim != axis]
        norm = torch.linalg.vector_norm(direction, dim=other_axes, keepdim=True) + DORA_EPS
        ratio = magnitude.reshape(norm.shape) / norm
        new_weight: Tensor = direction * (1 + self.strength * (ratio - 1))
        return new_weight


def _compute_low_rank(adapter: Adapter, shape: torch.Size) -> Tensor:
    up, down = adapter["up"].flatten(1), adapter["down"]
    if "mid" not in adapter:
        return up @ down.flatten(1)
    return torch.einsum("or,rskl,si->oikl", up, adapter["mid"], down.flatten(1))


def _compute_hadamard(adapter: Adapter, shape: torch.Size) -> Tensor:
    def get_factor(index: int) -> Tensor:
        a, b = adapter[f"hada_w{index}_a"], adapter[f"hada_w{index}_b"]
        if "hada_t1" not in adapter:
            return a @ b
        return torch.einsum(TUCKER_EQUATION, adapter[f"hada_t{index}"], a, b)

    return get_factor(1) * get_factor(2)


def _compute_kronecker(adapter: Adapter, shape: torch.Size) -> Tensor:
    def get_factor(index: int) -> Tensor:
        name = f"lokr_w{index}"
        if name in adapter:
            return adapter[name]
        a, b = adapter[f"{name}_a"], adapter[f"{name}_b"]
        if index == 2 and "lokr_t2" in adapter:
            return torch.einsum(TUCKER_EQUATION, adapter["lokr_t2"], a, b)
        return a @ b.flatten(1)

    first, second = get_factor(1), get_factor(2)
    kernel = shape[2:]
    second = second.reshape(len(second), -1, *kernel).contiguous()
    return torch.kron(first.reshape(*first.shape[:2], *(1 for _ in kernel)), second)


def _get_difference(adapter: Adapter, shape: torch.Size) -> Tensor:
    return next(adapter[name] for name in DIFFERENCE_NAMES if name in adapter)


def _scale_rows_or_columns(adapter: Adapter, weight: Tensor) -> Tensor:
    vector, shape = adapter["weight"].flatten().to(weight.device), [1] * weight.dim()
    shape[1 if adapter.on_input else 0] = -1
    return weight * (1 + vector.view(shape))


def _transform_by_glora(adapter: Adapter, weight: Tensor) -> Tensor:
    flat = weight.flatten(1)
    a1, a2, b1, b2 = (adapter[name].flatten(1).to(weight.device) for name in GLORA_NAMES)
    return (flat + adapter.scale * (flat @ a1 @ a2 + b1 @ b2)).view(weight.shape)


def _rotate_rows(adapter: Adapter, weight: Tensor) -> Tensor:
    """Rotate blocks of b rows of the weight, as OFT or BOFT.

    OFT's tensor is (k, b, b): a rotation for each of k blocks of consecutive rows. BOFT's is
    (m, k, b, b): m such stages, in each of which the rows of a block are farther apart (butterfly).
    """
    blocks = adapter["oft_blocks"].to(weight.device)
    block_size = blocks.shape[-1]
    skew = blocks - blocks.mT
    if adapter.alpha:  # constrained OFT limits the norm
        norm = skew.norm() + COFT_EPS
        skew = skew * (norm.clamp(max=adapter.alpha * len(weight)) / norm)
    eye = torch.eye(block_size, device=weight.device)
    rotations = (eye + skew) @ torch.linalg.inv(eye - skew)  # Cayley transform
    rows = weight.flatten(1)  # (out, in kh kw)
    if blocks.dim() == 3:
        rows = torch.einsum("knm,knc->kmc", rotations, rows.view(-1, block_size, rows.shape[1]))
    else:
        for stage, rotation in enumerate(rotations):
            # Bring rows that are `stride` apart together, rotate, and bring them back.
            stride = (1 << stage) * (block_size // 2)
            rows = rows.reshape(-1, 2, stride, rows.shape[-1]).transpose(1, 2)
            rows = rotation @ rows.reshape(len(rotation), block_size, -1)
            rows = rows.reshape(-1, stride, 2, rows.shape[-1]).transpose(1, 2)
    rows = rows.reshape(weight.shape)
    if "rescale" in adapter:
        rows = rows * adapter["rescale"].to(weight.device).view(-1, *[1] * (weight.dim() - 1))
    return rows


@dataclass(frozen=True)
class _AdapterType:
    """The function that builds a change, and the names of its tensors, separated by spaces."""

    build: Callable[[Target, Adapter, float], WeightChange]
    required: str
    optional: str = ""

    def matches(self, names: Set[str]) -> bool:
        required = set(self.required.split())
        return required <= names <= required.union(self.optional.split())


_LOHA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
_build_low_rank = partial(_AdapterDelta, _compute_low_rank)
_build_hadamard = partial(_AdapterDelta, _compute_hadamard)
_build_kronecker = partial(_AdapterDelta, _compute_kronecker)
ADAPTER_TYPES = (
    _AdapterType(_build_low_rank, "up down", "mid"),
    _AdapterType(_build_hadamard, _LOHA),
    _AdapterType(_build_hadamard, f"{_LOHA} hada_t1 hada_t2"),
    _AdapterType(_build_kronecker, "lokr_w1 lokr_w2"),
    _AdapterType(_build_kronecker, "lokr_w1_a lokr_w1_b lokr_w2"),
    _AdapterType(_build_kronecker, "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_t2"),
    _AdapterType(_build_kronecker, "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b", "lokr_t2"),
    *(_AdapterType(partial(_AdapterDelta, _get_difference), name) for name in DIFFERENCE_NAMES),
    _AdapterType(partial(_WeightTransform, _scale_rows_or_columns), "weight"),
    _AdapterType(partial(_WeightTransform, _transform_by_glora), " ".join(GLORA_NAMES)),
    _AdapterType(partial(_WeightTransform, _rotate_rows), "oft_blocks", "rescale"),
)
