"""Depth as a condition: MiDaS, what its network is fed, and how a latent network reads a map.

    image (B, 3, H, W) in [-1, 1] --estimate--> depth (B, 1, H', W') --resized--> (B, 1, h, w)
    depth (B, 1, h, w) of any range --encoder--> Cond.concat (B, 1, h, w) in [-1, 1]

Estimating is slow and is done once; conditioning with and without a prompt then reads the same
map. A map of one's own enters where the estimated one would: any size, any range, near = large.

Ranftl et al. 2020 (arXiv:1907.01341) and 2021 (arXiv:2103.13413).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.encoders.dpt import DPT, MULTIPLE

TARGET = 384  # pixels of the side that decides, as in the training of MiDaS
# model_type: sizes of the network; `embed_dim`, `depth`, `num_heads`, `img_size` are timm's words
ARCHS: dict[str, dict[str, Any]] = {
    "dpt_hybrid": {
        "embed_dim": 768, "depth": 12, "num_heads": 12, "img_size": 384, "hooks": (8, 11),
        "features": 256,
    },
}  # fmt: skip


class MiDaSDepth(nn.Module):
    """A depth map of the latent's size -> channel (B, 1, h, w), scaled to [-1, 1] per image.

    model_type: a name in ARCHS; None has no network, and reads maps that are given.
    arch: sizes that differ from it.
    margin: added to the range of the map before dividing; 0.001 where the original trained, 0
        where its scripts sampled.

    It has no `null`: leaving out the prompt leaves the depth in. The weights are those of the MiDaS
    files and of `depth_model` in published checkpoints.
    """

    slot: Literal["concat"] = "concat"
    key = cached = "depth"

    def __init__(
        self,
        *,
        model_type: str | None = "dpt_hybrid",
        arch: Mapping[str, Any] | None = None,
        margin: float = 0.0,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.model: DPT | None = None
        if model_type is None:
            return
        if model_type not in ARCHS:
            names = ", ".join(ARCHS)
            raise ValueError(f"unknown depth model `{model_type}`, choose one of {names}")
        size = ARCHS[model_type] | dict(arch or {})
        hooks, features = size.pop("hooks"), size.pop("features")
        self.model = DPT(_backbone(size), hooks=tuple(hooks), features=features)
        self.requires_grad_(False)

    def forward(self, depth: Tensor) -> Tensor:
        """depth: (B, 1, h, w), of the latent's size and of any range."""
        return scaled(depth, self.margin)  # (B, 1, h, w)

    def estimate(self, image: Tensor) -> Tensor:
        """Inverse depth (B, 1, H', W') float32 of images (B, 3, H, W) in [-1, 1], near = large.

        H' and W' are the network's own, see `network_size`.
        """
        return self.infer(midas_input(image))

    def infer(self, midas_in: Tensor) -> Tensor:
        """Inverse depth (B, 1, H', W') float32 of what `midas_input` gives, (B, 3, H', W').

        Raises ValueError without a network.
        """
        if self.model is None:
            raise ValueError("this model cannot estimate depth: give it a map (--depth-map FILE)")
        x = midas_in.to(next(self.model.parameters()))
        return self.model(x).float()

    def prepare(
        self,
        batch: Mapping[str, Any],
        *,
        size: tuple[int, int],
        encode: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The record that this encoder reads, made from what a batch has.

            batch: `depth` (B, 1, …), else `midas_in` (B, 3, H', W'), else `jpg` (B, 3, H, W).
            size: of the latent, (h, w).
            encode, generator: not needed here.
        Raises KeyError if the batch has none of the three.
        """
        if "depth" in batch:
            return {"depth": resized(batch["depth"], size)}
        if "midas_in" in batch:
            return {"depth": resized(self.infer(batch["midas_in"]), size)}
        if "jpg" in batch:
            return {"depth": resized(self.estimate(batch["jpg"]), size)}
        given = ", ".join(f"`{key}`" for key in batch)
        raise KeyError(f"depth comes from `depth`, `midas_in` or `jpg`, the batch has {given}")


def midas_input(image: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], of any size -> what the network is fed, (B, 3, H', W').

    Cubic interpolation with a = -0.75 and without smoothing, as OpenCV has it. The values stay in
    [-1, 1] but for overshoot: MiDaS' mean and deviation are both 0.5.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"images (B, 3, H, W) are expected, got {tuple(image.shape)}")
    size = network_size(image.shape[-2], image.shape[-1])
    image = image.float()
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False)


def network_size(height: int, width: int) -> tuple[int, int]:
    """The size at which MiDaS looks at an image: one side near 384, both multiples of 32.

    The side that is nearer to 384 decides for both; halves round to even.
    """
    scale = min(TARGET / height, TARGET / width, key=lambda s: abs(1 - s))
    return _to_multiple(height * scale), _to_multiple(width * scale)


def resized(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """A depth map (B, 1, H, W) at another size, bicubic; as it is if that is its size."""
    if depth.dim() != 4 or depth.shape[1] != 1:
        raise ValueError(f"depth maps (B, 1, H, W) are expected, got {tuple(depth.shape)}")
    if tuple(depth.shape[-2:]) == tuple(size):
        return depth.float()
    return F.interpolate(depth.float(), size=size, mode="bicubic", align_corners=False)


def scaled(depth: Tensor, margin: float = 0.0) -> Tensor:
    """Each map stretched to [-1, 1]; a constant one becomes -1.

    depth: (B, 1, h, w). margin: added to its range before dividing.
    """
    low, high = (f(depth, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    span = (high - low + margin).clamp(min=torch.finfo(depth.dtype).tiny)
    return 2 * (depth - low) / span - 1


def _to_multiple(side: float) -> int:
    return max(round(side / MULTIPLE), 1) * MULTIPLE


def _backbone(size: Mapping[str, Any]) -> nn.Module:
    """The hybrid ViT of timm (R50 + ViT-B/16 unless `size` says otherwise), without weights.

    timm is imported here and not above: it takes seconds, and only depth models need it.
    """
    try:
        from timm import create_model
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision made for another torch
        raise ImportError(
            f"depth models need `timm` and a torchvision that fits this torch ({error})\n"
            "hint: pip install 'ldm-revived[depth]'"
        ) from error
    return create_model("vit_base_r50_s16_384", pretrained=False, **size)
