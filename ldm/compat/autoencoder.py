"""`ldm.models.autoencoder` of the original: the KL autoencoder, with its training steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.compat.distributions import DiagonalGaussianDistribution
from ldm.compat.ema import LitEma
from ldm.compat.lightning import LightningModule, TrainingModule, read_state_dict
from ldm.compat.model import Decoder, Encoder
from ldm.compat.util import instantiate_from_config

Batch = dict[str, Any]


class AutoencoderKL(TrainingModule):
    """Images <-> distributions over latents.

    Args:
        ddconfig: Keyword arguments of Encoder and Decoder.
        lossconfig: Config of the loss, such as LPIPSWithDiscriminator; `torch.nn.Identity` if the
            model is not trained.
        embed_dim: Channels of the latent.
        ckpt_path, ignore_keys: See `init_from_ckpt`; None = random weights.
        image_key: Batch key of the images.
        colorize_nlabels: Channels of label maps, for `to_rgb`; None = those of its first input.
        monitor: Name of the logged value by which Lightning selects checkpoints; None = unset.
        ema_decay: Decay of the EMA of the weights; None = no EMA.
        learn_logvar: Whether to train the log variance of the loss.
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
        """Load the weights of a checkpoint whose names the model has.

        Args:
            path: File in any format that `ldm.load` reads; objects in it are not unpickled.
            ignore_keys: Prefixes of the names to leave out.
        """
        self.load_state_dict(read_state_dict(path, ignore_keys), strict=False)

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
        """Return reconstructions from a sample or the mode of the posterior, and the posterior."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def get_last_layer(self) -> Tensor:
        """Return the weight at which the loss compares gradient norms, to balance its terms."""
        return self.decoder.conv_out.weight

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Train the autoencoder on a batch, then the discriminator."""
        for optimizer_idx, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self._compute_loss(batch, optimizer_idx, "train")
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses of a batch, with the weights and with the EMA weights."""
        self._log_validation_losses(batch, "")
        if self.use_ema:
            with self.ema_scope():
                self._log_validation_losses(batch, "_ema")

    def configure_optimizers(self) -> Any:
        """Return an Adam for the autoencoder and one for the discriminator; no schedulers."""
        modules = (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if self.learn_logvar:
            parameters.append(self.loss.logvar)
        return [
            torch.optim.Adam(params, lr=self.learning_rate, betas=(0.5, 0.9))
            for params in (parameters, self.loss.discriminator.parameters())
        ], []

    @torch.no_grad()
    def log_images(
        self, batch: Batch, only_inputs: bool = False, log_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return images of a batch, their reconstructions, and decoded noise, by name.

        Args:
            only_inputs: Whether to return the images of the batch only.
            log_ema: Whether to add images of the EMA weights; always added with `use_ema`.
        """
        x = self.get_input(batch, self.image_key).to(self.device)
        log = {"inputs": self._convert_to_rgb(x)}
        if only_inputs:
            return log
        log |= self._sample_images(x, "")
        if log_ema or self.use_ema:
            with self.ema_scope():
                log |= self._sample_images(x, "_ema")
        return log

    def _sample_images(self, x: Tensor, suffix: str) -> dict[str, Tensor]:
        reconstruction, posterior = self(x)
        noise = torch.randn_like(posterior.sample())
        return {
            f"samples{suffix}": self.decode(noise),
            f"reconstructions{suffix}": self._convert_to_rgb(reconstruction),
        }

    def to_rgb(self, x: Tensor) -> Tensor:
        """Convert label maps (B, C, H, W) to images, see `project_to_rgb`."""
        if "colorize" not in self._buffers:
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1).to(x))
        return project_to_rgb(x, self.colorize)

    def _convert_to_rgb(self, x: Tensor) -> Tensor:
        return self.to_rgb(x) if x.shape[1] > 3 else x

    def _compute_loss(self, batch: Batch, optimizer_idx: int, split: str) -> Tensor:
        images = self.get_input(batch, self.image_key)
        reconstructions, posterior = self(images)
        loss: Tensor
        loss, loss_dict = self.loss(
            images,
            reconstructions,
            posterior,
            optimizer_idx,
            self.global_step // 2,  # as Lightning 2 counts the steps of both optimizers
            last_layer=self.get_last_layer(),
            split=split,
        )
        is_training = split == "train"
        self.log_dict(
            loss_dict, prog_bar=False, logger=True, on_step=is_training, on_epoch=not is_training
        )
        return loss

    def _log_validation_losses(self, batch: Batch, suffix: str) -> None:
        for optimizer_idx in range(2):
            self._compute_loss(batch, optimizer_idx, "val" + suffix)


def project_to_rgb(x: Tensor, weight: Tensor) -> Tensor:
    """Project x (B, C, h, w) to images (B, 3, h, w) in [-1, 1] by random weights (3, C, 1, 1)."""
    x = nn.functional.conv2d(x, weight=weight)
    return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0


class IdentityFirstStage(nn.Module):
    """Placeholder for an autoencoder: the latents are the images.

    Args:
        vq_interface: Whether `quantize` returns a tuple, as a VQ autoencoder does.
        args, kwargs: Ignored, as in the original.
    """

    def __init__(self, *args: object, vq_interface: bool = False, **kwargs: object) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x

    decode = encode
    forward = encode

    def quantize(self, x: Tensor, *args: object, **kwargs: object) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x


class VQModel(LightningModule):
    """Placeholder for the VQ autoencoder, for `isinstance`; it cannot be built."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        message = "VQModel cannot be built here: use `ldm.nets.autoencoder.AutoencoderVQ`"
        raise NotImplementedError(message)


class VQModelInterface(VQModel):
    """Placeholder for the VQ autoencoder of latent diffusion models."""
