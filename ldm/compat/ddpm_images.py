"""Images that the original's LatentDiffusion shows while it trains: `log_images` and its parts."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.compat.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.compat.ddim import DDIMSampler
from ldm.compat.ddpm_ancestral import AncestralSampling
from ldm.compat.ddpm_base import Batch
from ldm.compat.sampling import Condition, unless_none
from ldm.compat.util import isimage, ismap, log_txt_as_img

__all__ = ["ImageLogging"]

Images = dict[str, Any]


class ImageLogging(AncestralSampling):
    """Methods of LatentDiffusion that show images."""

    cond_stage_key: str
    decode_first_stage: Callable[..., Tensor]  # of LatentDiffusion
    get_unconditional_conditioning: Callable[..., Any]  # of LatentDiffusion

    def get_input(self, batch: Batch, k: str, **kwargs: Any) -> Any:
        """Encode a batch; see LatentDiffusion."""
        return super().get_input(batch, k)

    @torch.no_grad()
    def sample_log(
        self, cond: Condition, batch_size: int, ddim: bool, ddim_steps: int | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Sample latents by DDIM, or by the loop of the model; keywords go to the sampler."""
        if ddim and ddim_steps is not None:
            shape = (self.channels, self.image_size, self.image_size)
            sampler = DDIMSampler(self)
            return sampler.sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)
        samples, intermediates = self.sample(
            cond=cond, batch_size=batch_size, return_intermediates=True, **kwargs
        )
        return samples, intermediates

    @torch.no_grad()
    def log_images(
        self,
        batch: Batch,
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 50,
        ddim_eta: float = 0.0,
        return_keys: Sequence[str] | None = None,
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        use_ema_scope: bool = True,
        **kwargs: Any,
    ) -> Images:
        """Sample with the conditions of a batch, and show what goes in.

        Args:
            N, n_row: Samples, and those of them in rows of steps.
            ddim_steps: None samples by the loop of the model.
            return_keys: Images to return, if there are such.
            inpaint: Whether to fill the middle, and the rest, of the samples of the batch.

        Returns:
            Images (B, 3, H, W), and grids (3, H, W), by name.
        """
        z, c, x, reconstruction, original = self.get_input(
            batch,
            self.first_stage_key,
            return_first_stage_outputs=True,
            force_c_encode=True,
            return_original_cond=True,
            bs=N,
        )
        N, n_row = min(len(x), N), min(len(x), n_row)
        log: Images = {"inputs": x, "reconstruction": reconstruction}
        log |= self._show_condition(batch, x, c, original)
        options: dict[str, Any] = {
            "batch_size": N,
            "ddim": ddim_steps is not None,
            "ddim_steps": ddim_steps,
            "eta": ddim_eta,
        }
        if plot_diffusion_rows:
            log["diffusion_row"] = self._get_denoise_row_from_list(self._add_noise_steps(z[:n_row]))

        def draw(**more: Any) -> tuple[Tensor, Any]:
            with self._weights_to_log(use_ema_scope):
                samples, steps = self.sample_log(cond=c, **options, **more)
            return self.decode_first_stage(samples), steps

        if sample:
            log["samples"], steps = draw()
            if plot_denoise_rows:
                latents = steps["x_inter"] if isinstance(steps, dict) else steps
                log["denoise_row"] = self._get_denoise_row_from_list(latents)
            first_stage = self.first_stage_model
            is_vq = not isinstance(first_stage, AutoencoderKL | IdentityFirstStage)
            if quantize_denoised and is_vq:
                log["samples_x0_quantized"], _ = draw(quantize_denoised=True)
        if unconditional_guidance_scale > 1.0:
            uncond = self._null_condition(c, N, unconditional_guidance_label)
            log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"], _ = draw(
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=uncond,
            )
        if inpaint:
            height, width = z.shape[2:]
            mask = z.new_ones(N, 1, height, width)
            mask[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0.0
            log["mask"] = mask
            for name, keep in (("samples_inpainting", mask), ("samples_outpainting", 1.0 - mask)):
                log[name], _ = draw(x0=z[:N], mask=keep)
        if plot_progressive_rows:
            with self._weights_to_log(use_ema_scope):
                shape = (self.channels, self.image_size, self.image_size)
                _, estimates = self.progressive_denoising(c, shape=shape, batch_size=N)
            log["progressive_row"] = self._get_denoise_row_from_list(estimates)
        if return_keys and log.keys() & set(return_keys):
            return {key: log[key] for key in return_keys if key in log}
        return log

    def to_rgb(self, x: Tensor) -> Tensor:
        """Show maps (B, C, h, w) of any number of channels as images, by a random projection."""
        x = x.float()
        if "colorize" not in self.__dict__:
            self.colorize = torch.randn(3, x.shape[1], 1, 1).to(x)
        x = F.conv2d(x, weight=self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    def _get_denoise_row_from_list(
        self, samples: Sequence[Tensor], desc: str = "", force_no_decoder_quantization: bool = False
    ) -> Tensor:
        """Decode latents (B, C, h, w) of several steps to a grid, a row for each sample."""
        decoded = [
            self.decode_first_stage(
                z.to(self.device),
                **unless_none(force_not_quantize=force_no_decoder_quantization or None),
            )
            for z in samples
        ]
        return self._get_rows_from_list(decoded)

    def _get_rows_from_list(self, samples: Sequence[Tensor]) -> Tensor:
        """Lay out images (B, 3, H, W) of several steps as a grid, a row for each sample."""
        images = torch.stack([*samples], dim=1)  # (B, steps, 3, H, W)
        return _make_grid(images.flatten(0, 1), len(samples))

    def _add_noise_steps(self, z: Tensor) -> list[Tensor]:
        """Add noise to latents up to every `log_every_t`-th timestep, and the last."""
        last = self.num_timesteps - 1
        steps = [t for t in range(last + 1) if t % self.log_every_t == 0 or t == last]
        return [
            self.q_sample(z, torch.full((len(z),), t, device=z.device), torch.randn_like(z))
            for t in steps
        ]

    def _weights_to_log(self, averaged: bool) -> AbstractContextManager[None]:
        return self.ema_scope("Sampling") if averaged else nullcontext()

    def _show_condition(self, batch: Batch, x: Tensor, c: Condition, original: Any) -> Images:
        """Return the condition of the samples as images, where it can be shown."""
        if self.model.conditioning_key is None:
            return {}
        size = (x.shape[3], x.shape[2])
        decode = getattr(self.cond_stage_model, "decode", None)
        if decode is not None:
            return {"conditioning": decode(c)}
        if self.cond_stage_key in ("caption", "txt"):
            captions = batch[self.cond_stage_key][: len(x)]
            return {"conditioning": log_txt_as_img(size, captions, size=max(size[1] // 25, 1))}
        if self.cond_stage_key in ("class_label", "cls"):
            if "human_label" not in batch:
                return {}
            names = batch["human_label"][: len(x)]
            return {"conditioning": log_txt_as_img(size, names, size=max(size[1] // 25, 1))}
        if isimage(original):
            return {"conditioning": original}
        return {"original_conditioning": self.to_rgb(original)} if ismap(original) else {}

    def _null_condition(self, c: Condition, n: int, label: Any) -> Condition:
        """Return the condition of guidance: without the prompt, all else as in c."""
        uncond = self.get_unconditional_conditioning(n, label)
        return {**c, "c_crossattn": [uncond]} if isinstance(c, dict) else uncond


def _make_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Lay out images (N, 3, H, W) as one (3, H', W'), between black lines."""
    _, channels, height, width = images.shape
    rows = math.ceil(len(images) / columns)
    size = rows * (height + padding) + padding, columns * (width + padding) + padding
    grid = images.new_zeros(channels, *size)
    for n, image in enumerate(images):
        top = (n // columns) * (height + padding) + padding
        left = (n % columns) * (width + padding) + padding
        grid[:, top : top + height, left : left + width] = image
    return grid
