"""Patchwise coding and sampling of the original's LatentDiffusion, for images that are too large.

Programs set `split_input_params` on a model: kernel `ks` and `stride` (2 numbers each), the factor
`vqf` of the autoencoder, `patch_distributed_vq`, `tie_braker` (sic), and limits of the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.compat.ddpm_base import DDPM

__all__ = ["Patchwise"]

# Conditions that are cut like the latent.
IMAGE_KEYS = ("image", "LR_image", "segmentation", "bbox_img")


class Patchwise(DDPM):
    """Methods of LatentDiffusion that work on overlapping patches, and blend the results."""

    cond_stage_key: str
    first_stage_model: Any
    split_input_params: dict[str, Any]  # programs ask by hasattr whether there is one

    @property
    def patches(self) -> bool:
        """Whether a program has asked for patches."""
        return "split_input_params" in self.__dict__

    def meshgrid(self, h: int, w: int) -> Tensor:
        """Return the row and column of each position, (h, w, 2)."""
        return torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)

    def delta_border(self, h: int, w: int) -> Tensor:
        """Return the distance of each position to the nearest border, (h, w): 0.5 in the middle."""
        places = self.meshgrid(h, w) / torch.tensor([h - 1, w - 1]).reshape(1, 1, 2)
        return torch.minimum(places, 1 - places).amin(dim=-1)

    def get_weighting(self, h: int, w: int, Ly: int, Lx: int, device: torch.device | str) -> Tensor:
        """Return the weight of each pixel of each of Ly x Lx patches, (1, h w, Ly Lx)."""
        options = self.split_input_params
        weighting = self.delta_border(h, w).clamp(
            options["clip_min_weight"], options["clip_max_weight"]
        )
        weighting = weighting.reshape(1, h * w, 1).repeat(1, 1, Ly * Lx).to(device)
        if options["tie_braker"]:
            places = self.delta_border(Ly, Lx).clamp(
                options["clip_min_tie_weight"], options["clip_max_tie_weight"]
            )
            weighting = weighting * places.reshape(1, 1, Ly * Lx).to(device)
        return weighting

    def get_fold_unfold(
        self,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        uf: int = 1,
        df: int = 1,
    ) -> tuple[torch.nn.Fold, torch.nn.Unfold, Tensor, Tensor]:
        """Return what cuts x (B, C, h, w) into patches and what joins them, and their weights.

        Args:
            uf, df: How much larger, or smaller, the joined patches are.

        Returns:
            Fold, Unfold, the sum of the weights (1, 1, h, w), and the weights (1, 1, k, k, L).
        """
        height, width = x.shape[2:]
        rows = (height - kernel_size[0]) // stride[0] + 1
        columns = (width - kernel_size[1]) // stride[1] + 1
        unfold = torch.nn.Unfold(tuple(kernel_size), dilation=1, padding=0, stride=tuple(stride))

        def scale(number: int) -> int:
            return number * uf if uf > 1 else number // df

        kernel = tuple(kernel_size)
        if uf > 1 or df > 1:  # as in the original, the height stands for both
            kernel = (scale(kernel_size[0]),) * 2
        fold = torch.nn.Fold(
            (scale(height), scale(width)),
            kernel,
            dilation=1,
            padding=0,
            stride=tuple(scale(s) for s in stride),
        )
        high, wide = kernel
        weighting = self.get_weighting(high, wide, rows, columns, x.device).to(x.dtype)
        normalization: Tensor = fold(weighting)  # (1, 1, h, w)
        return fold, unfold, normalization, weighting.reshape(1, 1, high, wide, rows * columns)

    def encode_patches(self, x: Tensor) -> Any:
        """Encode images by patches, with `patch_distributed_vq`, else as a whole."""
        options = self.split_input_params
        options["original_image_size"] = x.shape[-2:]
        return self._code_patches(self.first_stage_model.encode, x, df=options["vqf"])

    def decode_patches(self, decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Decode latents by patches, with `patch_distributed_vq`, else as a whole."""
        image: Tensor = self._code_patches(decode, z, uf=self.split_input_params["vqf"])
        return image

    def apply_to_patches(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Run the UNet on patches of x (B, C, h, w); there may be one condition."""
        options = self.split_input_params
        ((key, values),) = cond.items()
        (condition,) = values
        kernel, stride = options["ks"], options["stride"]
        fold, unfold, normalization, weighting = self.get_fold_unfold(x, kernel, stride)
        patches = _cut(unfold, x, kernel)
        conditions = [condition] * len(patches)
        if self.cond_stage_key in IMAGE_KEYS and self.model.conditioning_key is not None:
            conditions = _cut(unfold, condition, kernel)
        outputs = [
            self.model(patch, t, **{key: [one]})
            for patch, one in zip(patches, conditions, strict=True)
        ]
        return _blend(outputs, fold, normalization, weighting)

    def _code_patches(
        self, code: Callable[[Tensor], Any], x: Tensor, uf: int = 1, df: int = 1
    ) -> Any:
        options = self.split_input_params
        if not options.get("patch_distributed_vq"):
            return code(x)
        kernel, stride = (
            tuple(min(one, side) for one, side in zip(options[key], x.shape[-2:], strict=True))
            for key in ("ks", "stride")
        )
        fold, unfold, normalization, weighting = self.get_fold_unfold(x, kernel, stride, uf, df)
        outputs = [code(patch) for patch in _cut(unfold, x, kernel)]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise TypeError("only autoencoders that encode to tensors can do so by patches")
        return _blend(outputs, fold, normalization, weighting)


def _cut(unfold: torch.nn.Unfold, x: Tensor, kernel: Sequence[int]) -> list[Tensor]:
    """Cut x (B, C, h, w) into patches."""
    patches: Tensor = unfold(x)  # (B, C k k, L)
    return list(patches.reshape(len(x), -1, *kernel, patches.shape[-1]).unbind(dim=-1))


def _blend(
    outputs: Sequence[Tensor], fold: torch.nn.Fold, normalization: Tensor, weighting: Tensor
) -> Tensor:
    """Join patches to one map (B, C, h, w): their weighted mean."""
    weighted = torch.stack([*outputs], dim=-1) * weighting  # (B, C, k, k, L)
    joined: Tensor = fold(weighted.flatten(1, 3))
    return joined / normalization
