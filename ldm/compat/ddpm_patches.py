"""Patch-wise processing in the original's LatentDiffusion, for images that need too much memory.

Third-party code sets the attribute `split_input_params` of a model, a dict:

    ks, stride                    height and width of the patches, and vertical and horizontal
                                  stride, in pixels of the image or of the latent
    vqf                           downscaling factor of the autoencoder
    patch_distributed_vq          whether the autoencoder, too, is applied to patches
    tie_braker (sic)              whether patches at the border have smaller weights
    clip_{min,max}_weight         limits of the weights of pixels
    clip_{min,max}_tie_weight     limits of the weights of patches
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.compat.ddpm_base import DDPM

# Batch keys of conditions of the latent's size, which are split into patches, too
SPATIAL_COND_KEYS = ("image", "LR_image", "segmentation", "bbox_img")


class PatchProcessing(DDPM):
    """DDPM with methods that process patches and blend the results; LatentDiffusion inherits it."""

    cond_stage_key: str
    first_stage_model: Any
    split_input_params: dict[str, Any]  # unset by default: third-party code tests with `hasattr`

    @property
    def uses_patches(self) -> bool:
        """Whether `split_input_params` is set."""
        return "split_input_params" in self.__dict__

    def meshgrid(self, h: int, w: int) -> Tensor:
        """Return the row and column index of each position, (h, w, 2)."""
        return torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)

    def delta_border(self, h: int, w: int) -> Tensor:
        """Return the distance of each position to the nearest border, (h, w): 0 … 0.5."""
        positions = self.meshgrid(h, w) / torch.tensor([h - 1, w - 1])
        return torch.minimum(positions, 1 - positions).amin(dim=-1)

    def get_weighting(self, h: int, w: int, Ly: int, Lx: int, device: torch.device | str) -> Tensor:
        """Return the weight of each pixel (h, w) of each of Ly x Lx patches, (1, h w, Ly Lx)."""
        options = self.split_input_params
        weights = self.delta_border(h, w).clamp(
            options["clip_min_weight"], options["clip_max_weight"]
        )
        weights = weights.reshape(1, h * w, 1).repeat(1, 1, Ly * Lx).to(device)
        if options["tie_braker"]:
            patch_weights = self.delta_border(Ly, Lx).clamp(
                options["clip_min_tie_weight"], options["clip_max_tie_weight"]
            )
            weights = weights * patch_weights.reshape(1, 1, Ly * Lx).to(device)
        return weights

    def get_fold_unfold(
        self,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        uf: int = 1,
        df: int = 1,
    ) -> tuple[torch.nn.Fold, torch.nn.Unfold, Tensor, Tensor]:
        """Build modules that split x (B, C, h, w) into patches and sum them, and the weights.

        Args:
            kernel_size, stride: (height, width), in pixels of x.
            uf, df: Factor by which patches are upscaled, or downscaled, before they are summed.

        Returns:
            Fold and Unfold; the sum of the weights at each pixel, (1, 1, h, w); and the weights of
            each of L patches, (1, 1, k, k, L).
        """
        height, width = x.shape[2:]
        Ly = (height - kernel_size[0]) // stride[0] + 1
        Lx = (width - kernel_size[1]) // stride[1] + 1
        unfold = torch.nn.Unfold(tuple(kernel_size), dilation=1, padding=0, stride=tuple(stride))

        def rescale(length: int) -> int:
            return length * uf if uf > 1 else length // df

        kernel = tuple(kernel_size)
        if uf > 1 or df > 1:  # as in the original, the rescaled kernel is square
            kernel = (rescale(kernel_size[0]),) * 2
        fold = torch.nn.Fold(
            (rescale(height), rescale(width)),
            kernel,
            dilation=1,
            padding=0,
            stride=tuple(rescale(length) for length in stride),
        )
        weighting = self.get_weighting(kernel[0], kernel[1], Ly, Lx, x.device).to(x.dtype)
        normalization: Tensor = fold(weighting)  # (1, 1, h, w)
        return fold, unfold, normalization, weighting.reshape(1, 1, *kernel, Ly * Lx)

    def encode_patches(self, x: Tensor) -> Any:
        """Encode images, patch by patch if `patch_distributed_vq`."""
        options = self.split_input_params
        options["original_image_size"] = x.shape[-2:]  # read by third-party code
        return self._process_patches(self.first_stage_model.encode, x, df=options["vqf"])

    def decode_patches(self, decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Decode latents, patch by patch if `patch_distributed_vq`."""
        image: Tensor = self._process_patches(decode, z, uf=self.split_input_params["vqf"])
        return image

    def apply_to_patches(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Run the UNet on patches of x (B, C, h, w); `cond` must have exactly one condition."""
        options = self.split_input_params
        ((key, (condition,)),) = cond.items()
        kernel, stride = options["ks"], options["stride"]
        fold, unfold, normalization, weighting = self.get_fold_unfold(x, kernel, stride)
        patches = _split_into_patches(unfold, x, kernel)
        conditions = [condition] * len(patches)
        if self.cond_stage_key in SPATIAL_COND_KEYS and self.model.conditioning_key is not None:
            conditions = _split_into_patches(unfold, condition, kernel)
        outputs = [
            self.model(patch, t, **{key: [patch_condition]})
            for patch, patch_condition in zip(patches, conditions, strict=True)
        ]
        return _blend_patches(outputs, fold, normalization, weighting)

    def _process_patches(
        self, process: Callable[[Tensor], Any], x: Tensor, uf: int = 1, df: int = 1
    ) -> Any:
        options = self.split_input_params
        if not options.get("patch_distributed_vq"):
            return process(x)
        kernel, stride = (
            tuple(map(min, options[key], x.shape[-2:]))  # a small image is one patch
            for key in ("ks", "stride")
        )
        fold, unfold, normalization, weighting = self.get_fold_unfold(x, kernel, stride, uf, df)
        outputs = [process(patch) for patch in _split_into_patches(unfold, x, kernel)]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise TypeError("patch_distributed_vq needs an autoencoder that encodes to a tensor")
        return _blend_patches(outputs, fold, normalization, weighting)


def _split_into_patches(unfold: torch.nn.Unfold, x: Tensor, kernel: Sequence[int]) -> list[Tensor]:
    """Split x (B, C, h, w) into L patches (B, C, k, k)."""
    patches: Tensor = unfold(x)  # (B, C k k, L)
    return list(patches.reshape(len(x), -1, *kernel, patches.shape[-1]).unbind(dim=-1))


def _blend_patches(
    patches: Sequence[Tensor], fold: torch.nn.Fold, normalization: Tensor, weighting: Tensor
) -> Tensor:
    """Return the weighted mean (B, C, h, w) of L overlapping patches (B, C, k, k)."""
    weighted = torch.stack([*patches], dim=-1) * weighting  # (B, C, k, k, L)
    weighted_sum: Tensor = fold(weighted.flatten(1, 3))
    return weighted_sum / normalization
