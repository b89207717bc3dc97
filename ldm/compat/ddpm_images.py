"""Images that the original's LatentDiffusion logs during training: `log_images`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.compat.autoencoder import AutoencoderKL, IdentityFirstStage, project_to_rgb
from ldm.compat.ddim import DDIMSampler
from ldm.compat.ddpm_ancestral import AncestralSampling
from ldm.compat.ddpm_base import Batch
from ldm.compat.sampling import Condition, drop_none
from ldm.compat.util import isimage, ismap, log_txt_as_img

Images = dict[str, Any]
GRID_PADDING = 2  # pixels around the images of a grid, as in torchvision's `make_grid`


class ImageLogging(AncestralSampling):
    """DDPM with the method `log_images`, which LatentDiffusion inherits."""

    cond_stage_key: str
    decode_first_stage: Callable[..., Tensor]  # defined by LatentDiffusion
    get_unconditional_conditioning: Callable[..., Any]  # defined by LatentDiffusion

    def get_input(self, batch: Batch, k: str, **kwargs: Any) -> Any:
        """Encode a batch; see LatentDiffusion."""
        return super().get_input(batch, k)

    @torch.no_grad()
    def sample_log(
        self, cond: Condition, batch_size: int, ddim: bool, ddim_steps: int | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Sample latents by DDIM, or by DDPM; `kwargs` are passed to the sampler."""
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
        """Return images of a batch, and images sampled with its conditions.

        Args:
            N, n_row: Number of samples of the batch to use, and of rows in `diffusion_row`.
            ddim_steps: Number of DDIM steps; None = DDPM sampling.
            return_keys: Names of the images to return; all are returned if it is None, or if none
                of them exists.
            quantize_denoised: Whether to sample also with quantized x_0, if the autoencoder is VQ.
            inpaint: Whether to inpaint the center of the images, and to outpaint the rest.
            unconditional_guidance_scale: If above 1, sample also with guidance.
            unconditional_guidance_label: See `get_unconditional_conditioning`.
            kwargs: Ignored, as in the original.

        Returns:
            Images (B, 3, H, W), and grids (3, H, W), by name.
        """
        z, c, x, reconstruction, original_cond = self.get_input(
            batch,
            self.first_stage_key,
            return_first_stage_outputs=True,
            force_c_encode=True,
            return_original_cond=True,
            bs=N,
        )
        N, n_row = min(len(x), N), min(len(x), n_row)
        log: Images = {"inputs": x, "reconstruction": reconstruction}
        log |= self._visualize_condition(batch, x, c, original_cond)
        options: dict[str, Any] = {
            "batch_size": N,
            "ddim": ddim_steps is not None,
            "ddim_steps": ddim_steps,
            "eta": ddim_eta,
        }
        if plot_diffusion_rows:
            log["diffusion_row"] = self._get_denoise_row_from_list(
                self._add_noise_at_timesteps(z[:n_row])
            )

        weights_scope = self.ema_scope if use_ema_scope else nullcontext

        def sample_images(**sampler_options: Any) -> tuple[Tensor, Any]:
            with weights_scope():
                samples, intermediates = self.sample_log(cond=c, **options, **sampler_options)
            return self.decode_first_stage(samples), intermediates

        if sample:
            log["samples"], intermediates = sample_images()
            if plot_denoise_rows:
                if isinstance(intermediates, dict):  # of DDIM
                    intermediates = intermediates["x_inter"]
                log["denoise_row"] = self._get_denoise_row_from_list(intermediates)
            first_stage = self.first_stage_model
            is_vq = not isinstance(first_stage, AutoencoderKL | IdentityFirstStage)
            if quantize_denoised and is_vq:
                log["samples_x0_quantized"], _ = sample_images(quantize_denoised=True)
        if unconditional_guidance_scale > 1.0:
            uncond = self.get_unconditional_conditioning(N, unconditional_guidance_label)
            if isinstance(c, dict):  # only the prompt is replaced
                uncond = {**c, "c_crossattn": [uncond]}
            log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"], _ = sample_images(
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=uncond,
            )
        if inpaint:
            height, width = z.shape[2:]
            mask = z.new_ones(N, 1, height, width)
            mask[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0.0
            log["mask"] = mask
            log["samples_inpainting"], _ = sample_images(x0=z[:N], mask=mask)
            log["samples_outpainting"], _ = sample_images(x0=z[:N], mask=1.0 - mask)
        if plot_progressive_rows:
            with weights_scope():
                shape = (self.channels, self.image_size, self.image_size)
                _, pred_x0s = self.progressive_denoising(c, shape=shape, batch_size=N)
            log["progressive_row"] = self._get_denoise_row_from_list(pred_x0s)
        if return_keys and log.keys() & set(return_keys):
            return {key: log[key] for key in return_keys if key in log}
        return log

    def to_rgb(self, x: Tensor) -> Tensor:
        """Convert x (B, C, h, w), with any number of channels, to images; see `project_to_rgb`."""
        x = x.float()
        if "colorize" not in self.__dict__:
            self.colorize = torch.randn(3, x.shape[1], 1, 1).to(x)
        return project_to_rgb(x, self.colorize)

    def _get_denoise_row_from_list(
        self, samples: Sequence[Tensor], desc: str = "", force_no_decoder_quantization: bool = False
    ) -> Tensor:
        """Decode latents (B, C, h, w) of several steps to a grid, one row per sample."""
        decoded = [
            self.decode_first_stage(
                z.to(self.device),
                **drop_none(force_not_quantize=force_no_decoder_quantization or None),
            )
            for z in samples
        ]
        return self._get_rows_from_list(decoded)

    def _get_rows_from_list(self, samples: Sequence[Tensor]) -> Tensor:
        """Make a grid (3, H', W') of images (B, 3, H, W) of several steps, one row per sample."""
        images = F.pad(torch.stack([*samples], dim=1), (0, GRID_PADDING, 0, GRID_PADDING))
        grid = rearrange(images, "b steps c h w -> c (b h) (steps w)")
        return F.pad(grid, (GRID_PADDING, 0, GRID_PADDING, 0))

    def _add_noise_at_timesteps(self, z: Tensor) -> list[Tensor]:
        """Return latents with the noise of every `log_every_t`-th timestep and of the last one."""
        last = self.num_timesteps - 1
        timesteps = [t for t in range(last + 1) if t % self.log_every_t == 0 or t == last]
        return [
            self.q_sample(z, torch.full((len(z),), t, device=z.device), torch.randn_like(z))
            for t in timesteps
        ]

    def _visualize_condition(
        self, batch: Batch, x: Tensor, c: Condition, original_cond: Any
    ) -> Images:
        """Return the conditions of the samples as images; {} if they cannot be visualized."""
        if self.model.conditioning_key is None:
            return {}
        decode = getattr(self.cond_stage_model, "decode", None)
        if decode is not None:
            return {"conditioning": decode(c)}
        is_class = self.cond_stage_key in ("class_label", "cls")
        key = "human_label" if is_class else self.cond_stage_key
        if key in ("caption", "txt", "human_label") and key in batch:
            height, width = x.shape[-2:]
            captions = batch[key][: len(x)]
            # The font size is the original's.
            images = log_txt_as_img((width, height), captions, size=max(height // 25, 1))
            return {"conditioning": images}
        if isimage(original_cond):
            return {"conditioning": original_cond}
        return {"original_conditioning": self.to_rgb(original_cond)} if ismap(original_cond) else {}
