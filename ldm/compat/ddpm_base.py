"""DDPM of the original: a UNet and a noise schedule, with loss and training steps.

Ho et al. 2020 (arXiv:2006.11239).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compat.diffusion_util import extract_into_tensor, make_beta_schedule
from ldm.compat.distributions import normal_kl
from ldm.compat.ema import LitEma
from ldm.compat.lightning import LightningModule, TrainingModule, read_state_dict
from ldm.compat.util import instantiate_from_config, mean_flat
from ldm.diffusion.schedule import Schedule
from ldm.train.runs.initial_weights import resize_weight

Batch = dict[str, Any]
Config = Any  # {"target": …, "params": …}, a dict or a node of OmegaConf
Losses = dict[str, Tensor]
CONDITIONING_KEYS = (
    None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm"
)  # fmt: skip


def uniform_on_device(
    r1: float, r2: float, shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """Draw float32 values from the uniform distribution between r1 and r2."""
    return (r1 - r2) * torch.rand(*shape, device=device) + r2


class DiffusionWrapper(LightningModule):
    """A UNet that is conditioned according to `conditioning_key`.

    Args:
        diff_model_config: Config of the UNet. With `sequential_crossattn: true` next to `target`,
            the UNet gets the list of contexts, one per transformer block, else their concatenation.
        conditioning_key: "concat" (channels), "crossattn" (context), "hybrid" (both), "adm" (class
            labels or vectors), "hybrid-adm", "crossattn-adm"; None = unconditional.
    """

    def __init__(self, diff_model_config: Config, conditioning_key: str | None) -> None:
        super().__init__()
        self.sequential_cross_attn = diff_model_config.pop("sequential_crossattn", False)
        self.diffusion_model: nn.Module = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"unknown conditioning_key `{conditioning_key}`")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet on x (B, C, h, w).

        Args:
            c_concat: Channels to concatenate with x, (B, C_i, h, w) each.
            c_crossattn: Contexts (B, M_i, D), concatenated along the tokens; with "adm" a list that
                contains only the class labels.
            c_adm: Class labels or vectors, `y` of the UNet.
        """
        key = self.conditioning_key
        if key in ("concat", "hybrid", "hybrid-adm"):
            assert c_concat is not None
            x = torch.cat([x, *c_concat], dim=1)
        kwargs: dict[str, object] = {}
        if key in ("crossattn", "hybrid", "hybrid-adm", "crossattn-adm"):
            assert c_crossattn is not None
            is_sequential = key == "crossattn" and self.sequential_cross_attn
            kwargs["context"] = c_crossattn if is_sequential else torch.cat([*c_crossattn], 1)
        if key == "adm":
            assert c_crossattn is not None
            kwargs["y"] = c_crossattn[0]
        if key in ("hybrid-adm", "crossattn-adm"):
            assert c_adm is not None
            kwargs["y"] = c_adm
        out: Tensor = self.diffusion_model(x, t, **kwargs)
        return out


class DDPM(TrainingModule):
    """A diffusion model of images; the base class of LatentDiffusion.

    Args:
        unet_config, conditioning_key: See `DiffusionWrapper`.
        loss_type: "l1" or "l2".
        ckpt_path, ignore_keys: See `init_from_ckpt`; None = random weights.
        load_only_unet: Whether `ckpt_path` has the weights of the UNet only.
        monitor: Name of the logged value by which Lightning selects checkpoints; None = unset.
        given_betas: Betas instead of `beta_schedule` and `timesteps`; None to compute them.
        original_elbo_weight, l_simple_weight: Weights of the variational lower bound and of the
            simple loss.
        v_posterior: The variance of sampling steps is (1 - v) posterior variance + v beta.
        scheduler_config: Config of the learning rate schedule; None = constant.
        learn_logvar: Whether to learn a log variance of the loss at each timestep.
        make_it_fit: Whether to repeat or cut the weights of a checkpoint with other channel counts.
        ucg_training: {batch key: {"p": probability, "val": replacement}}, conditions to replace at
            random in training, for classifier-free guidance; None = no replacement.
        reset_ema: Whether to restart the EMA from the weights of the checkpoint.
        reset_num_ema_updates: Whether to restart the warm-up of the EMA's decay.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    lvlb_weights: Tensor

    def __init__(
        self,
        unet_config: Config,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Config = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        make_it_fit: bool = False,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
    ) -> None:
        super().__init__()
        if parameterization not in ("eps", "x0", "v"):
            raise ValueError(f"parameterization must be eps, x0 or v, got `{parameterization}`")
        self.parameterization = parameterization
        self.cond_stage_model: nn.Module | None = None
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.use_positional_encodings = use_positional_encodings
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            # The EMA starts from the initial weights, as in the original: `reset_ema` is needed if
            # the checkpoint, which is loaded later, has no EMA weights.
            self.model_ema = LitEma(self.model)
        self.use_scheduler = scheduler_config is not None
        if self.use_scheduler:
            self.scheduler_config = scheduler_config
        self.v_posterior = v_posterior
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        if monitor is not None:
            self.monitor = monitor
        self.make_it_fit = make_it_fit
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)
            self.restart_ema(reset_ema, reset_num_ema_updates)
        self.register_schedule(
            given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s
        )
        self.loss_type = loss_type
        self.learn_logvar = learn_logvar
        # On the CPU even if weights are on the meta device, as no checkpoint has these values.
        logvar = torch.full((self.num_timesteps,), float(logvar_init), device="cpu")
        self.logvar: Tensor = nn.Parameter(logvar) if learn_logvar else logvar
        self.ucg_training = dict(ucg_training or {})
        if self.ucg_training:
            self.ucg_prng = np.random.RandomState()  # seeded by the system, as in the original

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Register the buffers of a noise schedule, in place of earlier ones."""
        with torch.device("cpu"):  # even if a program builds the model on the meta device
            array = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
            if given_betas is not None:
                array = np.asarray(given_betas)
            betas = torch.as_tensor(array, dtype=torch.float64)
            schedule = Schedule(betas, v_posterior=self.v_posterior)
            self.num_timesteps = len(schedule)
            self.betas_float64 = schedule.betas  # for `bridge.to_modern`: the buffers are float32
            self.linear_start = linear_start
            self.linear_end = linear_end
            old_betas = self._buffers.get("betas")
            device = "cpu" if old_betas is None else old_betas.device
            for name, buffer in schedule.compute_buffers().items():
                self.register_buffer(name, buffer.to(device))
            lvlb_weights = schedule.compute_vlb_weights(self.parameterization).to(device)
            self.register_buffer("lvlb_weights", lvlb_weights, persistent=False)
            self.update_cond_schedule()

    def update_cond_schedule(self) -> None:
        """Update the timesteps of the condition's noise; only LatentDiffusion has them."""

    def restart_ema(self, reset_ema: bool, reset_num_updates: bool) -> None:
        """Restart the EMA from the current weights, or restart the warm-up of its decay."""
        if (reset_ema or reset_num_updates) and not self.use_ema:
            raise ValueError("reset_ema and reset_num_ema_updates need use_ema")
        if reset_ema:
            self.model_ema = LitEma(self.model)
        if reset_num_updates:
            self.model_ema.reset_num_updates()

    @property
    def module_with_ema(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def init_from_ckpt(
        self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False
    ) -> None:
        """Load the weights of a checkpoint whose names the model has.

        Args:
            path: File in any format that `ldm.load` reads; objects in it are not unpickled.
            ignore_keys: Prefixes of the names to leave out.
            only_model: Whether to load only the UNet.
        """
        weights = read_state_dict(path, ignore_keys)
        if self.make_it_fit:
            weights |= _fit_weights(weights, self.state_dict())
        if only_model:
            weights = {name.removeprefix("model."): value for name, value in weights.items()}
        self.load_weights(weights, only_model)

    def load_weights(self, weights: Mapping[str, Tensor], only_model: bool = False) -> None:
        """Load the weights that `init_from_ckpt` has read."""
        (self.model if only_model else self).load_state_dict(weights, strict=False)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0) at timesteps t (B,)."""
        mean = self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1.0 - self._extract("alphas_cumprod", t, x_start)
        return mean, variance, self._extract("log_one_minus_alphas_cumprod", t, x_start)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute x_0 from x_t (B, …) and its noise, at timesteps t (B,)."""
        scaled = self._extract("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self._extract("sqrt_recipm1_alphas_cumprod", t, x_t) * noise

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute x_0 from x_t and v."""
        scaled = self._extract("sqrt_alphas_cumprod", t, x_t) * x_t
        return scaled - self._extract("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute the noise from x_t and v."""
        scaled = self._extract("sqrt_alphas_cumprod", t, x_t) * v
        return scaled + self._extract("sqrt_one_minus_alphas_cumprod", t, x_t) * x_t

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0)."""
        mean = self._extract("posterior_mean_coef1", t, x_t) * x_start
        mean = mean + self._extract("posterior_mean_coef2", t, x_t) * x_t
        variance = self._extract("posterior_variance", t, x_t)
        return mean, variance, self._extract("posterior_log_variance_clipped", t, x_t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Add the noise of timesteps t (B,) to x_0 (B, …); None draws the noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        scaled = self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
        return scaled + self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute v from x_0 and noise (arXiv:2202.00512)."""
        scaled = self._extract("sqrt_alphas_cumprod", t, x) * noise
        return scaled - self._extract("sqrt_one_minus_alphas_cumprod", t, x) * x

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Compute the L1 or L2 loss: the mean, or that of each element if `mean` is False."""
        if self.loss_type not in ("l1", "l2"):
            raise NotImplementedError(f"unknown loss type `{self.loss_type}`")
        loss_fn = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return loss_fn(pred, target, reduction="mean" if mean else "none")

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Any:
        """Compute the loss at timesteps t (B,), and the losses to log; None draws the noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.model(self.q_sample(x_start, t, noise), t)
        target = self.compute_target(x_start, noise, t)
        losses = self.get_loss(output, target, mean=False).mean((1, 2, 3))  # (B,)
        split = "train" if self.training else "val"
        simple, vlb = losses.mean(), (self.lvlb_weights[t] * losses).mean()
        loss = simple * self.l_simple_weight + self.original_elbo_weight * vlb
        loss_dict = {"loss_simple": simple, "loss_vlb": vlb, "loss": loss}
        return loss, {f"{split}/{name}": value for name, value in loss_dict.items()}

    def compute_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute the training target of the UNet: eps, v or x_0."""
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise if self.parameterization == "eps" else x_start

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of images x (B, C, H, W) at random timesteps."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=self.device)
        return self.p_losses(x, t, *args, **kwargs)

    def shared_step(self, batch: Batch, **kwargs: Any) -> tuple[Tensor, Losses]:
        """Compute the loss of a batch, and the losses to log."""
        loss, loss_dict = self(self.get_input(batch, self.first_stage_key))
        return loss, loss_dict

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, after the replacements of `ucg_training`."""
        for key, options in self.ucg_training.items():
            null_value = "" if options["val"] is None else options["val"]
            for i in range(len(batch[key])):
                if self.ucg_prng.choice(2, p=[1 - options["p"], options["p"]]):
                    batch[key][i] = null_value
        loss, loss_dict = self.shared_step(batch)
        self.log_dict(loss_dict, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        step = torch.tensor(float(self.global_step))
        self.log("global_step", step, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        if self.use_scheduler:
            lr = self.optimizers().param_groups[0]["lr"]
            self.log("lr_abs", lr, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses of a batch, with the weights and with the EMA weights."""
        _, loss_dict = self.shared_step(batch)
        with self.ema_scope():
            _, ema_loss_dict = self.shared_step(batch)
        loss_dict |= {f"{name}_ema": value for name, value in ema_loss_dict.items()}
        self.log_dict(loss_dict, prog_bar=False, logger=True, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW for the UNet; callers must have set the attribute `learning_rate`."""
        parameters = [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    def _extract(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Return a buffer's values at timesteps t (B,), as (B, 1, …) to broadcast with x (B, …)."""
        return extract_into_tensor(getattr(self, name), t, x.shape)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """Compute the noise from x_t (B, …) and x_0, at timesteps t (B,)."""
        scaled = self._extract("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - pred_xstart) / self._extract("sqrt_recipm1_alphas_cumprod", t, x_t)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Return the KL divergence of x_T from the standard normal, (B,), in bits per dimension."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)


def _fit_weights(
    weights: Mapping[str, Tensor], model_weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights that differ in shape from the model's, with channels repeated or cut."""
    fitted_weights = {}
    for name, model_weight in model_weights.items():
        weight, expected = weights.get(name), model_weight.shape
        if weight is None or weight.shape == expected:
            continue
        if weight.dim() != len(expected) or weight.shape[2:] != expected[2:]:
            shapes = f"shape {tuple(weight.shape)}, expected {tuple(expected)}"
            raise ValueError(f"make_it_fit: `{name}` has {shapes}")
        fitted_weights[name] = resize_weight(weight, expected)
    return fitted_weights
