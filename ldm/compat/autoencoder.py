"""`ldm.models.autoencoder` of the original: the KL autoencoder as a model that can be trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.compat.distributions import DiagonalGaussianDistribution
from ldm.compat.ema import LitEma
from ldm.compat.lightning import LightningModule, TrainedModule, read_state
from ldm.compat.model import Decoder, Encoder
from ldm.compat.util import instantiate_from_config

__all__ = [
    "AutoencoderKL",
    "Decoder",
    "DiagonalGaussianDistribution",
    "Encoder",
    "IdentityFirstStage",
    "LitEma",
    "VQModel",
    "VQModelInterface",
    "instantiate_from_config",
]

Batch = dict[str, Any]


class AutoencoderKL(TrainedModule):
    """Images <-> distributions over latents.

    Args:
        ddconfig: Keywords of Encoder and Decoder.
        lossconfig: Such as of LPIPSWithDiscriminator; `torch.nn.Identity` for use without training.
        embed_dim: Channels of the latent.
        colorize_nlabels: Channels of label maps, which are shown by a random projection.
        ema_decay: None for no average of the weights.
        learn_logvar: Whether the loss's log variance is trained.
    """

    colorize: Tensor

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Any,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimizers
        self.learn_logvar = learn_logvar
        self.image_key = image_key
        self.ddconfig = dict(ddconfig)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss: Any = instantiate_from_config(lossconfig)
        if not ddconfig["double_z"]:
            raise ValueError("ddconfig: AutoencoderKL needs `double_z: true`")
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.embed_dim = embed_dim
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor
        self.use_ema = ema_decay is not None
        if ema_decay is not None:
            self.ema_decay = ema_decay
            self.model_ema = LitEma(self, decay=ema_decay)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys=ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load the weights of a checkpoint that have a name here, without running what is in it.

        Args:
            ignore_keys: Starts of names that are left out.
        """
        self.load_state_dict(read_state(path, ignore_keys), strict=False)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Encode images (B, 3, H, W) to distributions over latents (B, C, h, w)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images, not clamped."""
        image: Tensor = self.decoder(self.post_quant_conv(z))
        return image

    def forward(
        self, input: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruct images from a sample of their posterior, or its mode."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def get_last_layer(self) -> Tensor:
        """Return the weight at which the gradients of the losses are compared."""
        return self.decoder.conv_out.weight

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Train on a batch: the autoencoder, then the discriminator."""
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self._loss(batch, index, "train")
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses of a batch, with the weights and with their average."""
        self._validate(batch, "")
        if self.use_ema:
            with self.ema_scope():
                self._validate(batch, "_ema")

    def configure_optimizers(self) -> Any:
        """Return Adam over the autoencoder, and over the discriminator, with `learning_rate`."""
        parts = (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        if self.learn_logvar:
            parameters.append(self.loss.logvar)
        groups = (parameters, list(self.loss.discriminator.parameters()))
        return [
            torch.optim.Adam(group, lr=self.learning_rate, betas=(0.5, 0.9)) for group in groups
        ], []

    @torch.no_grad()
    def log_images(
        self, batch: Batch, only_inputs: bool = False, log_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return images of a batch, their reconstructions, and decoded noise, by name."""
        x = self.get_input(batch, self.image_key).to(self.device)
        log = {"inputs": self._as_rgb(x)}
        if only_inputs:
            return log
        reconstruction, posterior = self(x)
        noise = torch.randn_like(posterior.sample())
        log |= {"samples": self.decode(noise), "reconstructions": self._as_rgb(reconstruction)}
        if log_ema or self.use_ema:
            with self.ema_scope():
                averaged, posterior = self(x)
                noise = torch.randn_like(posterior.sample())
                log |= {
                    "samples_ema": self.decode(noise),
                    "reconstructions_ema": self._as_rgb(averaged),
                }
        return log

    def to_rgb(self, x: Tensor) -> Tensor:
        """Show label maps (B, C, H, W) as images, by a random projection."""
        if "colorize" not in self._buffers:
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1).to(x))
        x = nn.functional.conv2d(x, weight=self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    def _as_rgb(self, x: Tensor) -> Tensor:
        return self.to_rgb(x) if x.shape[1] > 3 else x

    def _loss(self, batch: Batch, index: int, split: str) -> Tensor:
        images = self.get_input(batch, self.image_key)
        reconstructions, posterior = self(images)
        loss: Tensor
        loss, parts = self.loss(
            images,
            reconstructions,
            posterior,
            index,
            self.global_step // 2,  # of Lightning 2, which counts both optimizers
            last_layer=self.get_last_layer(),
            split=split,
        )
        trains = split == "train"
        self.log_dict(parts, prog_bar=False, logger=True, on_step=trains, on_epoch=not trains)
        return loss

    def _validate(self, batch: Batch, suffix: str) -> None:
        for index in range(2):
            self._loss(batch, index, "val" + suffix)


class IdentityFirstStage(nn.Module):
    """An autoencoder whose latents are the images.

    Args:
        vq_interface: Whether `quantize` returns what that of a codebook does.
    """

    def __init__(self, *args: object, vq_interface: bool = False, **kwargs: object) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x

    def decode(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x

    def quantize(self, x: Tensor, *args: object, **kwargs: object) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x


class VQModel(LightningModule):
    """The autoencoder with a codebook, which programs test models for; it cannot be built."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("VQ autoencoders are not supported yet")


class VQModelInterface(VQModel):
    """The autoencoder with a codebook as a first stage."""
