"""Training an autoencoder on pixels: no discriminator, no perceptual network."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.nets.autoencoder import AutoencoderKL

__all__ = ["Reconstruction", "normalise", "psnr"]


class Reconstruction:
    """The training task of an AutoencoderKL.

    l1, l2: weights of the absolute and the squared error, means over all values in [-1, 1].
    gradient: weight of the absolute error of differences between neighbours: sharp edges.
    kl: weight of the divergence from a standard normal, in nats per image.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        *,
        l1: float = 1.0,
        l2: float = 1.0,
        gradient: float = 0.5,
        kl: float = 1e-6,
    ) -> None:
        self.model = self.trained = model
        self.l1, self.l2, self.gradient, self.kl = l1, l2, gradient, kl

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """{"loss", "psnr", "kl"} of a batch of images ("jpg")."""
        image = batch["jpg"].to(self.model.quant_conv.weight.device)  # (B, 3, H, W)
        made, posterior = self.model(image, generator)
        error = made.float() - image
        kl = posterior.kl().float().mean()
        loss = self.l1 * error.abs().mean() + self.l2 * error.square().mean()
        loss = loss + self.gradient * _edges(error) + self.kl * kl
        return {"loss": loss, "psnr": psnr(made.detach().float(), image).mean(), "kl": kl.detach()}

    @torch.inference_mode()
    def weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """The model with latents normalised on these images (3, H, W): mean 0, std 1."""
        device = self.model.quant_conv.weight.device
        z = [self.model.encode(image[None].to(device)).mode() for image in images]
        model = copy.deepcopy(self.model)
        normalise(model, torch.cat(z))
        return model.state_dict()


def psnr(made: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [-1, 1], decibels, (B,)."""
    error = (made.clamp(-1, 1) - image).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


@torch.no_grad()
def normalise(model: AutoencoderKL, z: Tensor) -> None:
    """Folds mean and standard deviation of every latent channel into the 1x1 convolutions.

    z: (N, C, h, w) latents of the model. Afterwards its latents have mean 0 and std 1 (so the
    scale factor is 1) and decode to the same images.
    """
    channels = z.shape[1]
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    after, before = model.quant_conv, model.post_quant_conv
    assert after.bias is not None
    assert before.bias is not None
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= std[None, :, None, None]
    after.weight[:channels] /= std[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - mean) / std
    after.bias[channels:] -= 2 * std.log()  # the log variance scales with the square


def _edges(error: Tensor) -> Tensor:
    down = error[..., 1:, :] - error[..., :-1, :]
    right = error[..., :, 1:] - error[..., :, :-1]
    return down.abs().mean() + right.abs().mean()
