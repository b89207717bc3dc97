"""Subclasses of the original's LatentDiffusion: inpainting, depth, upscaling, image embeddings.

Their `get_input` adds conditions: channels concatenated with the latent (`c_concat`) or vectors
(`c_adm`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compat.ddpm_base import DDPM, Batch, Config
from ldm.compat.latent_diffusion import LatentDiffusion, freeze
from ldm.compat.util import instantiate_from_config
from ldm.encoders.concat_images import PatchesToChannels
from ldm.encoders.depth import normalize_depth, resize_depth

# The weight of the first convolution, and its EMA
FINETUNE_KEYS = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
)


class ConcatDiffusion(LatentDiffusion):
    """Base class of models with `c_concat`, with other defaults of `log_images`."""

    def log_images(  # type: ignore[override]  # other defaults
        self,
        batch: Batch,
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 200,
        ddim_eta: float = 1.0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return images to log, by default without inpainting and progressive denoising."""
        options = {"inpaint": False, "plot_progressive_rows": False} | kwargs
        return super().log_images(batch, N, n_row, sample, ddim_steps, ddim_eta, **options)


class LatentFinetuneDiffusion(ConcatDiffusion):
    """A model with more input channels than the one it is fine-tuned from.

    Args:
        concat_keys: Batch keys of the channels that are concatenated with the latent.
        finetune_keys: Names of the checkpoint's weights to zero-pad for new input channels; None =
            no padding.
        keep_finetune_dims: Number of input channels to copy from the checkpoint.
        c_concat_log_start, c_concat_log_end: Range of the channels of `c_concat` that `log_images`
            decodes; both None = no such image.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FINETUNE_KEYS,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.finetune_keys = finetune_keys
        self.concat_keys = concat_keys
        self.keep_dims = keep_finetune_dims
        self.c_concat_log_start = c_concat_log_start
        self.c_concat_log_end = c_concat_log_end
        super().__init__(*args, **kwargs)

    def load_weights(self, weights: Mapping[str, Tensor], only_model: bool = False) -> None:
        """Load the weights of a checkpoint, and zero-pad those of `finetune_keys`."""
        shapes = {name: weight.shape for name, weight in self.state_dict().items()}
        padded = dict(weights)
        for name in self.finetune_keys or ():
            if name in weights and name in shapes and weights[name].shape != shapes[name]:
                # Zeros, so that the new channels have no effect at first.
                padded[name] = weights[name].new_zeros(shapes[name])
                padded[name][:, : self.keep_dims] = weights[name]
        super().load_weights(padded, only_model)

    def make_concat_channels(self, batch: Batch, z: Tensor, bs: int | None) -> list[Tensor]:
        """Return the channels (B, C_i, h, w) of each of `concat_keys`, for latents (B, C, h, w)."""
        raise NotImplementedError

    def make_conditions(self, c_concat: Tensor) -> dict[str, Any]:
        """Return all conditions except the prompt, given the channels of `c_concat`."""
        return {"c_concat": [c_concat]}

    @torch.no_grad()
    def get_input(  # type: ignore[override]  # incompatible in the original, too
        self,
        batch: Batch,
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        return_first_stage_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Encode a batch as LatentDiffusion does; first stage outputs include the prompts."""
        z, c, *outputs = super().get_input(
            batch,
            self.first_stage_key,
            return_first_stage_outputs=return_first_stage_outputs,
            force_c_encode=True,
            return_original_cond=return_first_stage_outputs,
            bs=bs,
        )
        c_concat = torch.cat(self.make_concat_channels(batch, z, bs), dim=1)
        return [z, {**self.make_conditions(c_concat), "c_crossattn": [c]}, *outputs]

    def log_images(self, batch: Batch, N: int = 8, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return images to log, including the decoded channels of `c_concat`."""
        log = super().log_images(batch, N, *args, **kwargs)
        if self.c_concat_log_start is not None or self.c_concat_log_end is not None:
            _, c = self.get_input(batch, self.first_stage_key, bs=N)[:2]
            channels = slice(self.c_concat_log_start, self.c_concat_log_end)
            log["c_concat_decoded"] = self.decode_first_stage(c["c_concat"][0][:, channels])
        return log


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Inpainting: a mask and the latent of the masked image, concatenated with the latent."""

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        finetune_keys: Sequence[str] | None = FINETUNE_KEYS,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.masked_image_key = masked_image_key
        super().__init__(concat_keys, finetune_keys, *args, **kwargs)

    def make_concat_channels(self, batch: Batch, z: Tensor, bs: int | None) -> list[Tensor]:
        channels = []
        for key in self.concat_keys:
            image = DDPM.get_input(self, batch, key)[:bs].to(self.device)
            if key == self.masked_image_key:
                image = self.get_first_stage_encoding(self.encode_first_stage(image))
            else:
                image = F.interpolate(image, size=z.shape[-2:])
            channels.append(image)
        return channels

    def log_images(self, batch: Batch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return images to log, including the masked images."""
        log = super().log_images(batch, *args, **kwargs)
        log["masked_image"] = DDPM.get_input(self, batch, self.masked_image_key)
        return log


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Depth maps, estimated by a depth network, concatenated with the latent."""

    def __init__(
        self,
        depth_stage_config: Config,
        concat_keys: Sequence[str] = ("midas_in",),
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(concat_keys, *args, **kwargs)
        self.depth_model: nn.Module = instantiate_from_config(depth_stage_config)
        (self.depth_stage_key,) = concat_keys

    def make_concat_channels(self, batch: Batch, z: Tensor, bs: int | None) -> list[Tensor]:
        image: Tensor = batch[self.depth_stage_key][:bs].to(self.device)
        depth = self.depth_model(image)
        # The eps as in the original's training; its scripts do not add one.
        return [normalize_depth(resize_depth(depth, (z.shape[-2], z.shape[-1])), eps=0.001)]

    @torch.no_grad()
    def log_images(self, batch: Batch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return images to log, including the depth maps."""
        log = super().log_images(batch, *args, **kwargs)
        depth = self.depth_model(batch[self.depth_stage_key].to(self.device))
        log["depth"] = normalize_depth(depth)
        return log


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """Images concatenated with the latent, such as noise-augmented images of low resolution.

    Args:
        reshuffle_patch_size: Number of patches per side (not their size), see `PatchesToChannels`;
            None = images are not changed.
        low_scale_config: Config of the noise augmentation model; None = no noise.
        low_scale_key: Unused, as in the original.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Config = None,
        low_scale_key: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.reshuffle_patch_size = reshuffle_patch_size
        super().__init__(concat_keys, *args, **kwargs)
        self.low_scale_model: Any = None
        if low_scale_config is not None:
            self.low_scale_model = freeze(instantiate_from_config(low_scale_config))
            self.low_scale_key = low_scale_key

    def make_concat_channels(self, batch: Batch, z: Tensor, bs: int | None) -> list[Tensor]:
        images = [DDPM.get_input(self, batch, key)[:bs].to(self.device) for key in self.concat_keys]
        if self.reshuffle_patch_size is None:
            return images
        patches_to_channels = PatchesToChannels(patches_per_side=self.reshuffle_patch_size)
        return [patches_to_channels(image) for image in images]

    def make_conditions(self, c_concat: Tensor) -> dict[str, Any]:
        if self.low_scale_model is None:
            return {"c_concat": [c_concat]}
        c_concat, noise_level = self.low_scale_model(c_concat)
        return {"c_concat": [c_concat], "c_adm": noise_level}


class LatentUpscaleDiffusion(ConcatDiffusion):
    """Upscaling: a noise-augmented low-resolution image, concatenated with the latent.

    Args:
        low_scale_config: Config of the noise augmentation model.
        low_scale_key: Batch key of the image.
        noise_level_key: Must be None, as in the original.
    """

    def __init__(
        self,
        *args: Any,
        low_scale_config: Config,
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.cond_stage_trainable:
            raise ValueError("LatentUpscaleDiffusion cannot train its text encoder")
        self.instantiate_low_stage(low_scale_config)
        self.low_scale_key = low_scale_key
        self.noise_level_key = noise_level_key

    def instantiate_low_stage(self, config: Config) -> None:
        """Build the noise augmentation model, frozen."""
        self.low_scale_model: Any = freeze(instantiate_from_config(config))

    @torch.no_grad()
    def get_input(  # type: ignore[override]  # incompatible in the original, too
        self,
        batch: Batch,
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        log_mode: bool = False,
        return_first_stage_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Encode a batch: [z, condition].

        Args:
            log_mode: Whether to return images, their reconstructions, prompts, the low-resolution
                images without and with noise, and the noise levels as well.
        """
        return_images = log_mode or return_first_stage_outputs
        z, c, *outputs = super().get_input(
            batch,
            k,
            return_first_stage_outputs=return_images,
            force_c_encode=True,
            return_original_cond=return_images,
            bs=bs,
        )
        x_low = DDPM.get_input(self, batch, self.low_scale_key)[:bs].to(self.device)
        noised, noise_level = self.low_scale_model(x_low)
        if self.noise_level_key is not None:
            raise NotImplementedError("noise_level_key is not supported")
        cond = {"c_concat": [noised], "c_crossattn": [c], "c_adm": noise_level}
        if log_mode:
            outputs += [x_low, self.low_scale_model.decode(noised), noise_level]
        return [z, cond, *outputs]

    @torch.no_grad()
    def log_images(self, batch: Batch, N: int = 8, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return images to log, including the low-resolution images."""
        log = super().log_images(batch, N, *args, **kwargs)
        log["x_lr"] = DDPM.get_input(self, batch, self.low_scale_key)[:N]
        return log


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Stable unCLIP: a noise-augmented image embedding in addition to the prompt.

    Args:
        embedder_config: Config of the image encoder.
        embedding_key: Batch key of the images.
        embedding_dropout: Probability of zeroing the embedding in training.
        noise_aug_config: Config of the noise augmentation model; None = no noise.
    """

    def __init__(
        self,
        embedder_config: Config,
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        noise_aug_config: Config = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.embed_key = embedding_key
        self.embedding_dropout = embedding_dropout
        embedder = instantiate_from_config(embedder_config)
        self.embedder: nn.Module = freeze(embedder) if freeze_embedder else embedder
        self.noise_augmentor: nn.Module | None = None
        if noise_aug_config is not None:
            self.noise_augmentor = freeze(instantiate_from_config(noise_aug_config))

    @torch.no_grad()
    def get_input(  # type: ignore[override]  # incompatible in the original, too
        self,
        batch: Batch,
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode a batch; see LatentDiffusion."""
        z, c, *outputs = super().get_input(batch, k, bs=bs, **kwargs)
        image = DDPM.get_input(self, batch, self.embed_key)[:bs].to(self.device)
        c_adm: Tensor = self.embedder(image)
        if self.noise_augmentor is not None:
            c_adm = torch.cat(self.noise_augmentor(c_adm), dim=1)
        if self.training:
            keep_probs = torch.full((len(c_adm), 1), 1.0 - self.embedding_dropout)
            c_adm = torch.bernoulli(keep_probs.to(c_adm.device)) * c_adm
        return [z, {"c_crossattn": [c], "c_adm": c_adm}, *outputs]
