"""Patch-wise processing in the original's LatentDiffusion, for images that need too much memory.

Programs set the attribute `split_input_params` of a model, a dict:

    ks, stride                    (height, width) of patches, and of the distance between them, in
                                  pixels of the image or of the latent
    vqf                           downscaling factor of the autoencoder
    patch_distributed_vq          whether the autoencoder is applied to patches, too
    tie_braker (sic)              whether patches at the border have smaller weights
    clip_{min,max}_weight         limits of the weights of pixels
    clip_{min,max}_tie_weight     limits of the weights of patches
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.compat.ddpm_base import DDPM

# Batch keys of conditions that have the latent's size, and are cut into patches, too
IMAGE_KEYS = ("image", "LR_image", "segmentation", "bbox_img")


class PatchProcessing(DDPM):
    """Base class of LatentDiffusion: its methods that process patches, and blend the results."""

    cond_stage_key: str
    first_stage_model: Any
    split_input_params: dict[str, Any]  # missing without patches: programs test by `hasattr`

    @property
    def uses_patches(self) -> bool:
        """Whether a program has set `split_input_params`."""
        return "split_input_params" in self.__dict__

    def meshgrid(self, h: int, w: int) -> Tensor:
        """Return the row and column of each position, (h, w, 2)."""
        return torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)

    def delta_border(self, h: int, w: int) -> Tensor:
        """Return the distance of each position to the nearest border, (h, w): 0.5 in the middle."""
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
        """Build modules that cut x (B, C, h, w) into patches and sum them, and the weights.

        Args:
            kernel_size, stride: (height, width), in pixels of x.
            uf, df: Factor by which patches are upscaled, or downscaled, before they are summed.

        Returns:
            Fold and Unfold; the sum of the weights at each pixel, (1, 1, h, w); and the weights of
            each of L patches, (1, 1, k, k, L).
        """
        height, width = x.shape[2:]
        rows = (height - kernel_size[0]) // stride[0] + 1
        columns = (width - kernel_size[1]) // stride[1] + 1
        unfold = torch.nn.Unfold(tuple(kernel_size), dilation=1, padding=0, stride=tuple(stride))

        def scale(length: int) -> int:
            return length * uf if uf > 1 else length // df

        kernel = tuple(kernel_size)
        if uf > 1 or df > 1:  # as in the original, the height of the kernel is its width, too
            kernel = (scale(kernel_size[0]),) * 2
        fold = torch.nn.Fold(
            (scale(height), scale(width)),
            kernel,
            dilation=1,
            padding=0,
            stride=tuple(scale(length) for length in stride),
        )
        kernel_height, kernel_width = kernel
        weighting = self.get_weighting(kernel_height, kernel_width, rows, columns, x.device)
        weighting = weighting.to(x.dtype)
        normalization: Tensor = fold(weighting)  # (1, 1, h, w)
        return fold, unfold, normalization, weighting.reshape(1, 1, *kernel, rows * columns)

    def encode_patches(self, x: Tensor) -> Any:
        """Encode images, patch by patch with `patch_distributed_vq`."""
        options = self.split_input_params
        options["original_image_size"] = x.shape[-2:]  # programs read it
        return self._process_patches(self.first_stage_model.encode, x, df=options["vqf"])

    def decode_patches(self, decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Decode latents, patch by patch with `patch_distributed_vq`."""
        image: Tensor = self._process_patches(decode, z, uf=self.split_input_params["vqf"])
        return image

    def apply_to_patches(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Run the UNet on patches of x (B, C, h, w); `cond` must have exactly one condition."""
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
            self.model(patch, t, **{key: [condition]})
            for patch, condition in zip(patches, conditions, strict=True)
        ]
        return _blend(outputs, fold, normalization, weighting)

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
        outputs = [process(patch) for patch in _cut(unfold, x, kernel)]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise TypeError("patch_distributed_vq needs an autoencoder that encodes to a tensor")
        return _blend(outputs, fold, normalization, weighting)


def _cut(unfold: torch.nn.Unfold, x: Tensor, kernel: Sequence[int]) -> list[Tensor]:
    """Cut x (B, C, h, w) into patches."""
    patches: Tensor = unfold(x)  # (B, C k k, L)
    return list(patches.reshape(len(x), -1, *kernel, patches.shape[-1]).unbind(dim=-1))


def _blend(
    outputs: Sequence[Tensor], fold: torch.nn.Fold, normalization: Tensor, weighting: Tensor
) -> Tensor:
    """Return the weighted mean (B, C, h, w) of overlapping patches (B, C, k, k)."""
    weighted = torch.stack([*outputs], dim=-1) * weighting  # (B, C, k, k, L)
    weighted_sum: Tensor = fold(weighted.flatten(1, 3))
    return weighted_sum / normalization
