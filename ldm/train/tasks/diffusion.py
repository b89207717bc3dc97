"""Training of a latent diffusion model: image -> latent -> noisy latent -> prediction -> loss."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from ldm.conditioning import DROPOUT_QUIRKS
from ldm.data.source import to_device
from ldm.diffusion.schedule import Schedule
from ldm.encoders.depth import MiDaSDepth
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError
from ldm.runtime.types import JsonMapping
from ldm.train.tasks.criterion import Criterion
from ldm.train.tasks.noise_levels import LogNormal, draw_timesteps
from ldm.train.tasks.task import Batch, Losses, Task

__all__ = ["LEGACY_TRAINING", "ZERO_SIZES", "DiffusionTask"]

ZERO_SIZES = "zero-sizes-in-previews"  # sizes of 0 for the unconditional half, in image grids
LEGACY_TRAINING = (*DROPOUT_QUIRKS, ZERO_SIZES)
DEPTH_EPS = 0.001  # see `MiDaSDepth.eps`


@dataclass(eq=False)
class DiffusionTask(Task):
    """Training of the UNet of a LatentDiffusion, and of those encoders that are not frozen.

    Args:
        conditioning_dropout_prob: Probability of dropping the caption, for classifier-free
            guidance; or probabilities by batch key; None = the `ucg_rate` of each encoder.
        prior_loss_weight: Weight of the loss of "prior" samples, the class images of DreamBooth
            (arXiv:2208.12242).
        noise_levels: Keywords of `LogNormal`; None = uniform timesteps, or the defaults of
            `LogNormal` for continuous schedules.
        timestep_range: Range [first, end) to train on, (0, 200) for SDXL's refiner; None = all.
        timestep_bias: Timesteps have the density t ** (timestep_bias - 1): 1 is uniform, 2 favors
            high noise levels, where the caption matters most.
        noise_offset: Standard deviation of extra noise that is constant over each channel, so that
            the model learns to change the mean of an image; usually 0.1 (Guttenberg 2023).
        noise_offset_by: "channel", or "sample": the same constant in all channels.
        input_perturbation: Standard deviation of extra noise in the input, not the target; usually
            0.1 (arXiv:2301.11706).
        scale_by_std: Whether to export the measured `scale_factor`.
        legacy: The original's behaviors, names in LEGACY_TRAINING.
        disable_first_stage_autocast: Whether to encode images in full precision.
        criterion_options: Keywords of `Criterion`.
    Raises:
        ArgumentError: `timestep_range` is not a range of the schedule, or it or `timestep_bias` is
            given although timesteps are not uniform.
    """

    model: LatentDiffusion
    _: KW_ONLY
    conditioning_dropout_prob: float | Mapping[str, float] | None = 0.1
    prior_loss_weight: float = 1.0
    noise_levels: Mapping[str, float] | None = None
    timestep_range: Sequence[int] | None = None
    timestep_bias: float = 1.0
    noise_offset: float = 0.0
    noise_offset_by: str = "channel"
    input_perturbation: float = 0.0
    scale_by_std: bool = False
    legacy: Sequence[str] = ()
    disable_first_stage_autocast: bool = False
    criterion_options: JsonMapping = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, levels = self.model, self.noise_levels
        self._check_timesteps()
        self.sigma_distribution = None if levels is None else LogNormal(**levels)
        self.criterion = Criterion(
            model.schedule,
            model.parameterization,
            model_sigma_data=model.sigma_data,
            **self.criterion_options,
        )
        self.criterion.to(model.device)
        model.autoencoder.requires_grad_(False)
        for depth in model.conditioner.find_all(MiDaSDepth):
            depth.eps = depth.eps or DEPTH_EPS
        self.trainable = nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner})
        if self.criterion.learn_logvar:
            self.trainable["criterion"] = self.criterion

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Compute the losses of a batch, see `Criterion.forward`.

        Args:
            batch: Images "jpg" (B, 3, H, W) in [-1, 1], or latents "z" (B, C, h, w), which are the
                posterior's mean if its standard deviation "z_std" is given; captions "txt" and
                other inputs of the encoders; optionally "prior", a batch of class images.
        Returns:
            With a "prior": the weighted sum as "loss", its terms as "instance" and "prior".
        """
        losses = self._compute_loss(batch, generator)
        if "prior" not in batch:
            return losses
        prior = self._compute_loss(batch["prior"], generator)
        return {
            **losses,
            "loss": losses["loss"] + self.prior_loss_weight * prior["loss"],
            "instance": losses["loss"].detach(),
            "prior": prior["loss"].detach(),
            "t": torch.cat([losses["t"], prior["t"]]),
            "loss_per_sample": torch.cat([losses["loss_per_sample"], prior["loss_per_sample"]]),
        }

    def get_weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.model.state_dict()
        if self.criterion.learn_logvar:
            state["logvar"] = self.criterion.logvar
        if self.scale_by_std:
            state["scale_factor"] = torch.tensor(self.model.scale_factor)
        return state

    def _check_timesteps(self) -> None:
        schedule, timestep_range = self.model.schedule, self.timestep_range
        is_uniform = self.noise_levels is None and isinstance(schedule, Schedule)
        if not is_uniform and (timestep_range is not None or self.timestep_bias != 1):
            raise ArgumentError(
                "`timestep_range` and `timestep_bias` cannot be combined with `noise_levels` or a "
                "continuous noise schedule"
            )
        first, end = timestep_range or (0, len(schedule))
        if not 0 <= first < end <= len(schedule):
            raise ArgumentError(
                f"timestep_range: `[{first}, {end}]` should be a range [first, end) within 0 … "
                f"{len(schedule)}"
            )

    def _compute_loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        model = self.model
        batch = to_device(batch, model.device)

        # Encode the images, or sample cached latents from their posterior.
        z = batch.get("z")  # (B, C, h, w)
        if z is None:
            with torch.no_grad(), self._make_first_stage_autocast():
                z = model.encode(batch["jpg"], generator)
        elif "z_std" in batch:
            z = z + batch["z_std"] * torch.randn(z.shape, generator=generator).to(z)

        # Draw timesteps and noise. All come from one generator: another order of drawing would
        # change the numbers of a seed.
        t = draw_timesteps(
            model.schedule,
            len(z),
            generator,
            sigma_distribution=self.sigma_distribution,
            bias=self.timestep_bias,
            timestep_range=self.timestep_range,
        )  # (B,)
        noise, input_noise = self._draw_noise(z, generator)  # (B, C, h, w) each

        # Encode the conditions, dropping some at random.
        batch = model.prepare(batch, (z.shape[-2], z.shape[-1]), generator)
        cond = model.condition(batch, self.conditioning_dropout_prob, generator, self.legacy)

        # Predict, and compute the loss of the error.
        losses: Losses = self.criterion(
            model.denoiser.compute_error(z, cond, t, noise, input_noise), t
        )
        return losses

    def _make_first_stage_autocast(self) -> AbstractContextManager[object]:
        if self.disable_first_stage_autocast:
            return torch.autocast(self.model.device.type, enabled=False)
        return nullcontext()

    def _draw_noise(self, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the noise to predict, and the noise to add to latents z (B, C, h, w)."""
        # On the CPU, so that the noise of a seed is the same on every device.
        noise = torch.randn(z.shape, generator=generator)
        if self.noise_offset:
            channels = z.shape[1] if self.noise_offset_by == "channel" else 1
            offset = torch.randn((len(z), channels, 1, 1), generator=generator)
            noise += self.noise_offset * offset
        input_noise = noise
        if self.input_perturbation:
            perturbation = torch.randn(z.shape, generator=generator)
            input_noise = noise + self.input_perturbation * perturbation
        return noise.to(z), input_noise.to(z)
