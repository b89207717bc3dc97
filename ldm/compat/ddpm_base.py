"""DDPM of the original: a UNet, the tables of a noise schedule, loss and training.

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
from ldm.compat.lightning import LightningModule, TrainingModule, read_state
from ldm.compat.util import instantiate_from_config, mean_flat
from ldm.diffusion.schedule import Schedule

Batch = dict[str, Any]
Config = Any  # {"target": …, "params": …}, a dict or a node of OmegaConf
Losses = dict[str, Tensor]
CONDITIONING_KEYS = (
    None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm"
)  # fmt: skip


def uniform_on_device(
    r1: float, r2: float, shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """Draw float32 from the uniform distribution between r1 and r2."""
    return (r1 - r2) * torch.rand(*shape, device=device) + r2


class DiffusionWrapper(LightningModule):
    """A UNet, and how it takes its conditions.

    Args:
        diff_model_config: Config of the UNet. With `sequential_crossattn` beside its `target`, the
            contexts are a list of one per block of a transformer, else they are joined.
        conditioning_key: "concat" (channels), "crossattn" (context), "hybrid" (both), "adm" (class
            labels), "hybrid-adm" or "crossattn-adm"; None = no condition.
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
            c_crossattn: Contexts (B, M_i, D), concatenated over tokens; with "adm" the class
                labels as only entry.
            c_adm: Class labels or vectors, `y` of the UNet.
        """
        key = self.conditioning_key
        if key in ("concat", "hybrid", "hybrid-adm"):
            assert c_concat is not None
            x = torch.cat([x, *c_concat], dim=1)
        keywords: dict[str, object] = {}
        if key in ("crossattn", "hybrid", "hybrid-adm", "crossattn-adm"):
            assert c_crossattn is not None
            is_sequential = key == "crossattn" and self.sequential_cross_attn
            keywords["context"] = c_crossattn if is_sequential else torch.cat([*c_crossattn], 1)
        if key == "adm":
            assert c_crossattn is not None
            keywords["y"] = c_crossattn[0]
        if key in ("hybrid-adm", "crossattn-adm"):
            assert c_adm is not None
            keywords["y"] = c_adm
        out: Tensor = self.diffusion_model(x, t, **keywords)
        return out


class DDPM(TrainingModule):
    """A diffusion model of images, and the base class of those of latents.

    Args:
        unet_config, conditioning_key: See `DiffusionWrapper`.
        loss_type: "l1" or "l2".
        ckpt_path, ignore_keys: See `init_from_ckpt`; None = random weights.
        load_only_unet: Whether `ckpt_path` has the weights of the UNet alone.
        monitor: Logged value by which Lightning chooses checkpoints; None = no attribute.
        given_betas: Betas instead of `beta_schedule` and `timesteps`; None to compute them.
        original_elbo_weight, l_simple_weight: Weights of the variational lower bound and of the
            mean error.
        v_posterior: Weight of beta against the posterior variance.
        scheduler_config: Config of the learning rate schedule; None = a constant one.
        learn_logvar: Whether to learn a log variance of the error of each timestep.
        make_it_fit: Whether to repeat weights of a checkpoint whose layers have fewer channels.
        ucg_training: {batch key: {"p": probability, "val": replacement}}, entries of a batch to
            replace in training, for classifier-free guidance; None = none.
        reset_ema: Whether the EMA starts from the weights of the checkpoint.
        reset_num_ema_updates: Whether its warm-up starts again.
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
            # Of the initial weights, as in the original: for a checkpoint without EMA weights,
            # which is loaded later, `reset_ema` is needed.
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
        # On the CPU also if the weights are on the meta device: no checkpoint has these values.
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
        """Compute the tables of a noise schedule, and register them in place of earlier ones."""
        options = (linear_start, linear_end, cosine_s)
        values = make_beta_schedule(beta_schedule, timesteps, *options)
        if given_betas is not None:
            values = np.asarray(given_betas)
        betas = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        schedule = Schedule(betas, v_posterior=self.v_posterior)
        self.num_timesteps = len(schedule)
        self.betas_float64 = schedule.betas  # for `bridge.to_modern`: the buffers are float32
        self.linear_start = linear_start
        self.linear_end = linear_end
        old_betas = self._buffers.get("betas")
        device = torch.device("cpu") if old_betas is None else old_betas.device
        for name, table in schedule.buffers().items():
            self.register_buffer(name, table.to(device))
        weights = schedule.vlb_weights(self.parameterization).float().to(device)
        self.register_buffer("lvlb_weights", weights, persistent=False)
        self.update_cond_schedule()

    def update_cond_schedule(self) -> None:
        """Update what LatentDiffusion derives from the number of timesteps."""

    def restart_ema(self, reset_ema: bool, reset_num_updates: bool) -> None:
        """Start the EMA from the present weights, or its warm-up again."""
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
        """Load the weights of a checkpoint, as far as the model has their names.

        Args:
            path: A file of any format that `ldm.load` reads; objects in it are not unpickled.
            ignore_keys: Prefixes of names to leave out.
            only_model: Whether to load the UNet only.
        """
        state = read_state(path, ignore_keys)
        if self.make_it_fit:
            state |= _fit_weights(state, self.state_dict())
        if only_model:
            state = {name.removeprefix("model."): value for name, value in state.items()}
        self.load_weights(state, only_model)

    def load_weights(self, state: Mapping[str, Tensor], only_model: bool = False) -> None:
        """Load the weights of `init_from_ckpt`."""
        (self.model if only_model else self).load_state_dict(state, strict=False)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0) at timesteps t (B,)."""
        mean = self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1.0 - self._extract("alphas_cumprod", t, x_start)
        return mean, variance, self._extract("log_one_minus_alphas_cumprod", t, x_start)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute x_0 from x_t (B, …) at timesteps t (B,) and its noise."""
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
        """Add noise to x_0 (B, …), as of timesteps t (B,); None draws the noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        scaled = self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
        return scaled + self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute v from x_0 and noise (arXiv:2202.00512)."""
        scaled = self._extract("sqrt_alphas_cumprod", t, x) * noise
        return scaled - self._extract("sqrt_one_minus_alphas_cumprod", t, x) * x

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Compute the error of each value, or the mean error."""
        if self.loss_type not in ("l1", "l2"):
            raise NotImplementedError(f"unknown loss type `{self.loss_type}`")
        error = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return error(pred, target, reduction="mean" if mean else "none")

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Any:
        """Compute the loss at timesteps t (B,), and the values to log; None draws the noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.model(self.q_sample(x_start, t, noise), t)
        error = self.get_loss(output, self.target(x_start, noise, t), mean=False).mean((1, 2, 3))
        split = "train" if self.training else "val"
        simple, vlb = error.mean(), (self.lvlb_weights[t] * error).mean()
        loss = simple * self.l_simple_weight + self.original_elbo_weight * vlb
        parts = {"loss_simple": simple, "loss_vlb": vlb, "loss": loss}
        return loss, {f"{split}/{name}": value for name, value in parts.items()}

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the UNet should predict."""
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise if self.parameterization == "eps" else x_start

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of images x (B, C, H, W) at random timesteps."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=self.device)
        return self.p_losses(x, t, *args, **kwargs)

    def shared_step(self, batch: Batch, **kwargs: Any) -> tuple[Tensor, Losses]:
        """Compute the loss of a batch, and the values to log."""
        loss, parts = self(self.get_input(batch, self.first_stage_key))
        return loss, parts

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, after the replacements of `ucg_training`."""
        for key, options in self.ucg_training.items():
            null_value = "" if options["val"] is None else options["val"]
            for i in range(len(batch[key])):
                if self.ucg_prng.choice(2, p=[1 - options["p"], options["p"]]):
                    batch[key][i] = null_value
        loss, parts = self.shared_step(batch)
        self.log_dict(parts, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        step = torch.tensor(float(self.global_step))
        self.log("global_step", step, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        if self.use_scheduler:
            lr = self.optimizers().param_groups[0]["lr"]
            self.log("lr_abs", lr, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss of a batch, with the weights and with the EMA weights."""
        _, parts = self.shared_step(batch)
        with self.ema_scope():
            _, ema_losses = self.shared_step(batch)
        parts |= {f"{name}_ema": value for name, value in ema_losses.items()}
        self.log_dict(parts, prog_bar=False, logger=True, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW for the UNet, with `learning_rate`, an attribute that callers set."""
        parameters = [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    def _extract(self, table: str, t: Tensor, x: Tensor) -> Tensor:
        """Read a table at timesteps t (B,), as (B, 1, …) to broadcast with x (B, …)."""
        return extract_into_tensor(getattr(self, table), t, x.shape)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Compute the KL divergence of x_T from the standard normal, (B,), in bits per value."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)


def _fit_weights(
    state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights whose shapes differ from the model's, repeated or cut in two axes."""
    fitted = {}
    for name, target in model_state.items():
        old = state.get(name)
        if old is None or old.shape == target.shape:
            continue
        if old.dim() != target.dim() or old.shape[2:] != target.shape[2:]:
            raise ValueError(f"`{name}` of shape {tuple(old.shape)} fits no {tuple(target.shape)}")
        value = old[torch.arange(len(target)) % len(old)]
        if old.dim() > 1:
            in_channels = torch.arange(target.shape[1]) % old.shape[1]
            # As in the original, divided by one more than the number of copies.
            divisor = 1 + torch.bincount(in_channels, minlength=old.shape[1])[in_channels]
            shape = (1, -1, *(1,) * (old.dim() - 2))
            value = value[:, in_channels] / divisor.reshape(shape)
        fitted[name] = value
    return fitted
