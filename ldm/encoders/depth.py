"""Depth as a condition: MiDaS, its preprocessing, and the normalized depth map.

    image (B, 3, H, W) in [-1, 1] --estimate--> depth (B, 1, H', W') --resize_depth--> (B, 1, h, w)
    depth (B, 1, h, w) of any range --normalize_depth--> concat (B, 1, h, w) in [-1, 1]

Ranftl et al. 2020 (arXiv:1907.01341) and 2021 (arXiv:2103.13413).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Batch, Config, Encoder, PrepareOptions, Slot
from ldm.encoders.dpt import DPT, SIZE_MULTIPLE
from ldm.runtime.errors import ArgumentError, MissingArgument, check_name

MIDAS_SIZE = 384  # pixels along one side, as in the training of MiDaS
# By model_type; all but `hooks` and `features` are arguments of timm's backbone.
ARCHS: dict[str, dict[str, Any]] = {
    "dpt_hybrid": {
        "embed_dim": 768, "depth": 12, "num_heads": 12, "img_size": 384, "hooks": (8, 11),
        "features": 256,
    },
}  # fmt: skip


class MiDaSDepth(Encoder):
    """A depth map of the latent's size -> channel (B, 1, h, w), scaled to [-1, 1] per image.

    Args:
        model_type: Name in ARCHS; None = no network, so that a batch must have depth maps.
        arch: Overrides of entries of `model_type` in ARCHS; None = no overrides.
        eps: Added to max - min before dividing by it. Training replaces 0 by 0.001, as the
            original.
    """

    slot: Slot = "concat"
    key = "depth"
    cache_key = "depth"

    def __init__(
        self,
        *,
        model_type: str | None = "dpt_hybrid",
        arch: Config | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.model: DPT | None = None
        if model_type is None:
            return
        check_name("depth model", model_type, ARCHS, argument="model_type")
        kwargs = ARCHS[model_type] | dict(arch or {})
        hooks, features = kwargs.pop("hooks"), kwargs.pop("features")
        self.model = DPT(_build_backbone(kwargs), hooks=tuple(hooks), features=features)
        self.requires_grad_(False)

    def forward(self, depth: Tensor) -> Tensor:
        return normalize_depth(depth, self.eps)

    def estimate(self, image: Tensor) -> Tensor:
        """Estimate relative inverse depth (B, 1, H', W') of images (B, 3, H, W) in [-1, 1]."""
        return self.run_network(preprocess_for_midas(image))

    def run_network(self, midas_in: Tensor) -> Tensor:
        """Run the network on the output of `preprocess_for_midas`: (B, 1, H', W') float32."""
        if self.model is None:
            raise MissingArgument(
                "this model cannot estimate depth: a depth map is needed", "depth"
            )
        depth: Tensor = self.model(midas_in.to(next(self.model.parameters())))
        return depth.float()

    def prepare(self, batch: Batch, options: PrepareOptions) -> dict[str, Tensor]:
        """Make `depth` of the latent's size from `depth`, else `midas_in`, else `jpg`."""
        if "depth" in batch:
            depth = batch["depth"]
        elif "midas_in" in batch:
            depth = self.run_network(batch["midas_in"])
        elif "jpg" in batch:
            depth = self.estimate(batch["jpg"])
        else:
            keys = ", ".join(f"`{key}`" for key in batch)
            raise KeyError(f"depth needs `depth`, `midas_in` or `jpg`, the batch has {keys}")
        return {"depth": resize_depth(depth, options.latent_size)}


def preprocess_for_midas(image: Tensor) -> Tensor:
    """Resize images (B, 3, H, W) in [-1, 1] to (B, 3, H', W'), see `compute_midas_size`.

    Bicubic with a = -0.75 and without antialiasing, as in OpenCV. Images in [-1, 1] are already
    normalized: MiDaS' mean and standard deviation are both 0.5.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise ArgumentError(f"expected images (B, 3, H, W), got {tuple(image.shape)}")
    size = compute_midas_size(image.shape[-2], image.shape[-1])
    image = image.float()
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False)


def compute_midas_size(height: int, width: int) -> tuple[int, int]:
    """Compute height and width of MiDaS' input: one side about 384 pixels, both multiples of 32.

    The side nearer to 384 decides the scale; halves round to even.
    """
    scale = min(MIDAS_SIZE / height, MIDAS_SIZE / width, key=lambda s: abs(1 - s))
    return _round_to_multiple(height * scale), _round_to_multiple(width * scale)


def resize_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize depth maps (B, 1, H, W) by bicubic interpolation, if they have another size."""
    if depth.dim() != 4 or depth.shape[1] != 1:
        raise ArgumentError(f"expected depth maps (B, 1, H, W), got {tuple(depth.shape)}")
    if tuple(depth.shape[-2:]) == tuple(size):
        return depth.float()
    return F.interpolate(depth.float(), size=size, mode="bicubic", align_corners=False)


def normalize_depth(depth: Tensor, eps: float = 0.0) -> Tensor:
    """Scale each depth map (B, 1, h, w) to [-1, 1]; a constant one becomes -1."""
    low = depth.amin(dim=(1, 2, 3), keepdim=True)
    high = depth.amax(dim=(1, 2, 3), keepdim=True)
    span = (high - low + eps).clamp(min=torch.finfo(depth.dtype).tiny)
    return 2 * (depth - low) / span - 1


def _round_to_multiple(side: float) -> int:
    return max(round(side / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE


def _build_backbone(timm_kwargs: Config) -> nn.Module:
    """Build timm's hybrid ViT, R50 + ViT-B/16, without weights."""
    try:  # here, as importing timm takes seconds and only depth models need it
        from timm import create_model
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        raise ImportError(
            f"depth models need `timm` and a torchvision that fits this torch ({error})\n"
            "hint: pip install 'ldm-revived[depth]'"
        ) from error
    vit: nn.Module = create_model("vit_base_r50_s16_384", pretrained=False, **timm_kwargs)
    return vit
