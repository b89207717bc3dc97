"""Base classes of the original's samplers: arguments, timesteps, guidance, initial noise.

They call `model.apply_model(x, t, c)`, which third-party code overrides, at integer timesteps. This
is why they do not use `ldm.diffusion.samplers`, which are functions of sigma.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.compat.diffusion_util import (
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)

# A tensor, a list of tensors, or a dict of tensors and lists; passed to the model unchanged.
Condition = Any
Intermediates = dict[str, list[Tensor]]
StepOutput = tuple[Tensor, Tensor]  # x at the previous timestep, and the predicted x0


class FirstStage(Protocol):
    """An autoencoder with a codebook."""

    def quantize(self, z: Tensor) -> Sequence[Tensor]: ...


class ScoreCorrector(Protocol):
    """A hook that changes the predicted noise."""

    def modify_score(
        self,
        model: "DiffusionModel",
        e_t: Tensor,
        x: Tensor,
        t: Tensor,
        c: Condition,
        **kwargs: Any,
    ) -> Tensor: ...


class DiffusionModel(Protocol):
    """The methods of a model that samplers call; third-party code has its own model classes.

    `predict_*` are only called on v-prediction models, `q_sample` only with a mask, and
    `first_stage_model` is only used to quantize x0.
    """

    num_timesteps: int
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    parameterization: str
    first_stage_model: FirstStage

    @property
    def device(self) -> torch.device: ...

    def apply_model(self, x: Tensor, t: Tensor, c: Condition, /) -> Tensor: ...

    def q_sample(self, x_start: Tensor, t: Tensor, /) -> Tensor: ...

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor, /) -> Tensor: ...

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor, /) -> Tensor: ...


class Sampler:
    """Base class of the samplers.

    Args:
        device: Device of the buffers; None = that of the model at each `make_schedule`.
        kwargs: Ignored, as in the original.
    """

    make_schedule: Callable[..., None]
    sample_loop: Callable[..., tuple[Tensor, Any]]  # runs all steps of the schedule
    # Whether `device` was None; set here, too, as some subclasses do not call this constructor
    _follows_model_device = True

    def __init__(
        self, model: DiffusionModel, device: str | torch.device | None = None, **kwargs: object
    ) -> None:
        self.model = model
        self.device = model.device if device is None else torch.device(device)
        self._follows_model_device = device is None

    def register_buffer(self, name: str, attr: object) -> None:
        """Set an attribute; tensors are moved to the device."""
        if isinstance(attr, Tensor):
            if torch.device(self.device).type == "mps" and attr.dtype == torch.float64:
                attr = attr.float()  # MPS has no float64
            attr = attr.to(self.device)
        setattr(self, name, attr)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Condition = None,
        callback: Callable[[int], object] | None = None,
        normals_sequence: object = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, object] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Any]:
        """Sample latents (batch_size, *shape).

        Args:
            S: Number of steps; `make_ddim_timesteps` may give a few more.
            conditioning: Condition of the model; None = unconditional.
            callback: Called with the index of each step, from 0.
            img_callback: Called with the predicted x0 and the index of each step.
            normals_sequence: Ignored, as in the original.
            mask: (B, 1, h, w), 1 where `x0` is kept, 0 is sampled; None samples everywhere.
            temperature: Factor of the noise that each step adds.
            x_T: Initial noise; None draws it.
            unconditional_conditioning: Negative condition; None disables guidance.
            dynamic_threshold: Largest root mean square of x0, see `norm_thresholding`; PLMS only.
                None = no limit.
            ucg_schedule: Guidance scale of each step, DDIM only; None = a constant scale.
            kwargs: Ignored, as in the original.

        Returns:
            Latents; and a dict of latents and predicted x0 at every `log_every_t`-th step
            (`x_inter`, `pred_x0`), which is None for DPM-Solver.
        """
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose)
        return self.sample_loop(
            conditioning,
            (batch_size, *shape),
            callback=callback,
            img_callback=img_callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            ddim_use_original_steps=False,
            noise_dropout=noise_dropout,
            temperature=temperature,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            x_T=x_T,
            log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            **drop_none(dynamic_threshold=dynamic_threshold, ucg_schedule=ucg_schedule),
        )


class BaseDDIMSampler(Sampler):
    """Base class of DDIM and PLMS, which step through `ddim_timesteps` of the model.

    Attributes:
        ddim_timesteps: Timesteps of a run, int64, ascending.
        ddim_alphas, ddim_alphas_prev: ᾱ at each of them, and at the previous timestep.
        ddim_sigmas: Standard deviation of the noise that each step adds.
    """

    supports_eta = True
    ddim_timesteps: np.ndarray
    ddim_alphas: Tensor
    ddim_alphas_prev: np.ndarray
    ddim_sigmas: Tensor
    ddim_sqrt_one_minus_alphas: Tensor
    ddim_sigmas_for_original_num_steps: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self,
        model: DiffusionModel,
        schedule: str = "linear",
        device: str | torch.device | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(model, device)
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose timesteps, and compute the buffers from the model's current ones."""
        if ddim_eta != 0 and not self.supports_eta:
            raise ValueError("ddim_eta must be 0 for PLMS")
        if self._follows_model_device:  # the model may have been moved since
            self.device = self.model.device
        self.ddim_timesteps = make_ddim_timesteps(
            ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps, verbose=verbose
        )
        alphas, alphas_prev = (
            buffer.detach().float().cpu()
            for buffer in (self.model.alphas_cumprod, self.model.alphas_cumprod_prev)
        )
        if len(alphas) != self.ddpm_num_timesteps:
            raise ValueError(
                f"alphas_cumprod has {len(alphas)} values for {self.ddpm_num_timesteps} timesteps"
            )
        sigmas, ddim_alphas, ddim_alphas_prev = make_ddim_sampling_parameters(
            alphas, self.ddim_timesteps, ddim_eta, verbose=verbose
        )
        variance = (1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev)
        buffers: dict[str, object] = {
            "betas": self.model.betas.detach().float(),
            "alphas_cumprod": alphas,
            "alphas_cumprod_prev": alphas_prev,
            "sqrt_alphas_cumprod": alphas.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alphas).log(),
            "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
            "ddim_sigmas": sigmas,
            "ddim_alphas": ddim_alphas,
            "ddim_alphas_prev": ddim_alphas_prev,
            "ddim_sqrt_one_minus_alphas": (1 - torch.as_tensor(ddim_alphas)).sqrt(),
            "ddim_sigmas_for_original_num_steps": ddim_eta * variance.sqrt(),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    @torch.no_grad()
    def run_steps(
        self,
        cond: Condition,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
        timesteps: int | np.ndarray | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, object] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Sample latents of a shape (B, C, h, w) at the timesteps of `make_schedule`.

        Args:
            ddim_use_original_steps, timesteps: See `choose_timesteps`. The others: see `sample`.
        """
        device = self.model.betas.device
        img = torch.randn(shape, device=device) if x_T is None else x_T
        run_timesteps = self.choose_timesteps(timesteps, ddim_use_original_steps)
        if ucg_schedule is not None and len(ucg_schedule) != len(run_timesteps):
            raise ValueError(
                f"ucg_schedule must have {len(run_timesteps)} values, got {len(ucg_schedule)}"
            )
        intermediates = {"x_inter": [img], "pred_x0": [img]}
        old_eps: list[Tensor] = []
        for i in range(len(run_timesteps)):
            index = len(run_timesteps) - i - 1
            t, t_next = (
                torch.full((shape[0],), int(timestep), device=device, dtype=torch.long)
                # At the last step, `t_next` is t: there is no previous timestep.
                for timestep in (run_timesteps[index], run_timesteps[max(index - 1, 0)])
            )
            if mask is not None:  # before the step: nothing is restored after the last step
                img = restore_masked(self.model, img, x0, mask, t)
            if ucg_schedule is not None:
                unconditional_guidance_scale = ucg_schedule[i]
            img, pred_x0 = self.step(
                img,
                cond,
                t,
                t_next=t_next,
                old_eps=old_eps,
                index=index,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
                **drop_none(dynamic_threshold=dynamic_threshold),
            )
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(img)
                intermediates["pred_x0"].append(pred_x0)
        return img, intermediates

    def step(self, *args: Any, t_next: Tensor, old_eps: list[Tensor], **options: Any) -> StepOutput:
        """Step from x at timesteps t (B,) to `t_next`.

        Args:
            args: x, condition, and t.
            old_eps: Predicted noise of earlier steps, oldest first; PLMS appends to it.
            options: Keyword arguments of `p_sample_ddim` or `p_sample_plms`.
        """
        raise NotImplementedError

    def choose_timesteps(
        self, timesteps: "int | np.ndarray | None", use_original_steps: bool
    ) -> np.ndarray:
        """Return the timesteps of a run, ascending.

        Args:
            timesteps: Number of timesteps, of which the lowest are returned; None = all. As in the
                original, one fewer is returned unless `use_original_steps`.
            use_original_steps: Whether to choose from all timesteps of the model, not from those of
                `make_schedule`; `timesteps` may then be an array of timesteps.
        """
        if use_original_steps:
            if timesteps is None:
                return np.arange(self.ddpm_num_timesteps)
            return np.arange(timesteps) if isinstance(timesteps, int) else timesteps
        if timesteps is None:
            return self.ddim_timesteps
        total = len(self.ddim_timesteps)
        return self.ddim_timesteps[: int(min(timesteps / total, 1) * total) - 1]

    def get_step_coefficients(
        self, index: int, x: Tensor, use_original_steps: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ᾱ, the previous ᾱ, sigma of the added noise, and √(1 - ᾱ), (B, 1, 1, 1) each."""
        if use_original_steps:
            coefficients: tuple[Tensor | np.ndarray, ...] = (
                self.model.alphas_cumprod,
                self.model.alphas_cumprod_prev,
                self.ddim_sigmas_for_original_num_steps,
                self.sqrt_one_minus_alphas_cumprod,
            )
        else:
            coefficients = (
                self.ddim_alphas,
                self.ddim_alphas_prev,
                self.ddim_sigmas,
                self.ddim_sqrt_one_minus_alphas,
            )
        # Some are float64; as in the original, float32 is returned.
        shape = (len(x), *(1,) * (x.dim() - 1))
        a_t, a_prev, sigma_t, sqrt_one_minus_at = (
            torch.full(shape, float(values[index]), device=x.device) for values in coefficients
        )
        return a_t, a_prev, sigma_t, sqrt_one_minus_at

    def draw_noise(
        self, x: Tensor, sigma: Tensor, repeat: bool, temperature: float, dropout: float
    ) -> Tensor:
        """Draw the noise that a step adds."""
        # Drawn even if sigma is 0, so that later draws equal the original's.
        noise = sigma * noise_like(x.shape, x.device, repeat) * temperature
        return F.dropout(noise, p=dropout) if dropout > 0 else noise


def restore_masked(
    model: DiffusionModel, img: Tensor, x0: Tensor | None, mask: Tensor, t: Tensor
) -> Tensor:
    """Where the mask is 1, replace latents by x0 with the noise of timesteps t (B,)."""
    if x0 is None:
        raise TypeError("a mask needs x0")
    return model.q_sample(x0, t) * mask + (1.0 - mask) * img


def correct_score(
    model: DiffusionModel,
    corrector: ScoreCorrector,
    e_t: Tensor,
    x: Tensor,
    t: Tensor,
    c: Condition,
    options: Mapping[str, object] | None,
) -> Tensor:
    """Apply a score corrector to the predicted noise of an eps-prediction model."""
    if model.parameterization != "eps":
        raise ValueError("score_corrector needs an eps-prediction model")
    return corrector.modify_score(model, e_t, x, t, c, **(options or {}))


def drop_none(**kwargs: Any) -> dict[str, Any]:
    """Return the keyword arguments that are not None, as older overrides do not take the others."""
    return {name: value for name, value in kwargs.items() if value is not None}


def apply_with_guidance(
    apply_model: Callable[[Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    t: Tensor,
    c: Condition,
    scale: float,
    uncond: Condition,
) -> Tensor:
    """Return the output of a model, with classifier-free guidance unless `uncond` is None."""
    if uncond is None or scale == 1.0:
        return apply_model(x, t, c)
    # One batch, unconditional half first: third-party overrides of `apply_model` rely on this.
    outputs = apply_model(torch.cat([x] * 2), torch.cat([t] * 2), cat_conditions(uncond, c))
    uncond_output, cond_output = outputs.chunk(2)
    return uncond_output + scale * (cond_output - uncond_output)


def cat_conditions(uncond: Condition, c: Condition) -> Condition:
    """Concatenate two conditions along the batch axis, tensor by tensor; None stays None."""
    if c is None:
        return None
    if isinstance(c, dict):
        return {key: cat_conditions(uncond[key], value) for key, value in c.items()}
    if isinstance(c, list | tuple):
        return [cat_conditions(*pair) for pair in zip(uncond, c, strict=True)]
    return torch.cat([uncond, c])


def slice_condition(c: Condition, n: int) -> Condition:
    """Return the first n samples of a condition, which may be a list of captions."""
    if isinstance(c, Mapping):
        return {key: slice_condition(value, n) for key, value in c.items()}
    if isinstance(c, list) and all(isinstance(tensor, Tensor) for tensor in c):
        return [tensor[:n] for tensor in c]
    return c if c is None else c[:n]
