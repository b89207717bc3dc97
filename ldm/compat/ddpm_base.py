"""DDPM of the original: a UNet with the tables of a noise schedule, its loss, and its training.

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
from ldm.compat.lightning import LightningModule, TrainedModule, read_state
from ldm.compat.util import instantiate_from_config, mean_flat
from ldm.diffusion.schedule import Schedule

__all__ = ["DDPM", "Batch", "Config", "DiffusionWrapper", "uniform_on_device"]

Batch = dict[str, Any]
Config = Any  # {"target": …, "params": …}, a dict or a node of OmegaConf
Losses = dict[str, Tensor]
CONDITIONING_KEYS = (
    None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm"
)  # fmt: skip


def uniform_on_device(
    r1: float, r2: float, shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """Draw from a uniform distribution between r1 and r2."""
    return (r1 - r2) * torch.rand(*shape, device=device) + r2


class DiffusionWrapper(LightningModule):
    """A UNet that takes its condition by the way that `conditioning_key` names.

    Args:
        diff_model_config: Of the UNet. `sequential_crossattn` beside its `target` gives each block
            of a transformer a context of its own.
        conditioning_key: None, "concat", "crossattn", "hybrid" (both), or "adm" (classes), alone or
            as "hybrid-adm" and "crossattn-adm".
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
            c_concat: Channels to append, (B, ·, h, w) each.
            c_crossattn: Contexts to join along tokens, (B, ·, D) each; for "adm" one of classes.
            c_adm: Classes, or vectors of the time embedding.
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


class DDPM(TrainedModule):
    """A diffusion model over images, and the base class of those over latents.

    Args:
        unet_config: See `DiffusionWrapper`.
        given_betas: Instead of `beta_schedule` and `timesteps`.
        v_posterior: Weight of beta against the posterior variance.
        ucg_training: {batch key: {"p": probability, "val": what replaces the sample}}.
        make_it_fit: Repeat the weights of a checkpoint where the model is wider.
        load_only_unet: Whether `ckpt_path` has the weights of the UNet alone.
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
            # Of the initial weights, as in the original: a checkpoint is loaded later, and one
            # without an average of its own needs `reset_ema`.
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
        # A value, real even where the weights are built on the meta device.
        logvar = torch.full((self.num_timesteps,), float(logvar_init), device="cpu")
        self.logvar: Tensor = nn.Parameter(logvar) if learn_logvar else logvar
        self.ucg_training = dict(ucg_training or {})
        if self.ucg_training:
            self.ucg_prng = np.random.RandomState()  # of its own, as in the original

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the tables of a noise schedule, as buffers; those of a built model change."""
        options = (linear_start, linear_end, cosine_s)
        values = make_beta_schedule(beta_schedule, timesteps, *options)
        if given_betas is not None:
            values = np.asarray(given_betas)
        betas = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        schedule = Schedule(betas, v_posterior=self.v_posterior)
        self.num_timesteps = len(schedule)
        self.exact_betas = schedule.betas  # float64, for `bridge.to_modern`; buffers are float32
        self.linear_start = linear_start
        self.linear_end = linear_end
        old = self._buffers.get("betas")
        device = torch.device("cpu") if old is None else old.device
        for name, table in schedule.buffers().items():
            self.register_buffer(name, table.to(device))
        weights = schedule.vlb_weights(self.parameterization).float().to(device)
        self.register_buffer("lvlb_weights", weights, persistent=False)
        self.extend_schedule()

    def extend_schedule(self) -> None:
        """Compute what depends on the tables of `register_schedule`."""

    def restart_ema(self, weights: bool, updates: bool) -> None:
        """Let the average start from the weights of now, or its decay warm up again."""
        if (weights or updates) and not self.use_ema:
            raise ValueError("reset_ema and reset_num_ema_updates need use_ema")
        if weights:
            self.model_ema = LitEma(self.model)
        if updates:
            self.model_ema.reset_num_updates()

    @property
    def averaged_part(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def init_from_ckpt(
        self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False
    ) -> None:
        """Load the weights of a checkpoint that have a name here, without running what is in it.

        Args:
            ignore_keys: Starts of names that are left out.
            only_model: Whether to load the UNet only.
        """
        state = read_state(path, ignore_keys)
        if self.make_it_fit:
            state |= _fit(state, self.state_dict())
        if only_model:
            state = {name.removeprefix("model."): value for name, value in state.items()}
        self.load_weights(state, only_model)

    def load_weights(self, state: Mapping[str, Tensor], only_model: bool = False) -> None:
        """Load the weights of `init_from_ckpt`."""
        (self.model if only_model else self).load_state_dict(state, strict=False)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0), timesteps t (B,)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1.0 - self._at("alphas_cumprod", t, x_start)
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Compute x_0 of x_t, given its noise."""
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * noise

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute x_0 of x_t, given v."""
        scaled = self._at("sqrt_alphas_cumprod", t, x_t) * x_t
        return scaled - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Compute the noise of x_t, given v."""
        scaled = self._at("sqrt_alphas_cumprod", t, x_t) * v
        return scaled + self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * x_t

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start
        mean = mean + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Add noise to x_0 (B, …) up to timesteps t (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        scaled = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return scaled + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute v of x_0 and noise (arXiv:2202.00512)."""
        scaled = self._at("sqrt_alphas_cumprod", t, x) * noise
        return scaled - self._at("sqrt_one_minus_alphas_cumprod", t, x) * x

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Compute the error of each value, or its mean."""
        if self.loss_type not in ("l1", "l2"):
            raise NotImplementedError(f"unknown loss type `{self.loss_type}`")
        error = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return error(pred, target, reduction="mean" if mean else "none")

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Any:
        """Compute the loss at timesteps t (B,), and its parts by name."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.model(self.q_sample(x_start, t, noise), t)
        error = self.get_loss(output, self.target(x_start, noise, t), mean=False).mean((1, 2, 3))
        split = "train" if self.training else "val"
        simple = error.mean() * self.l_simple_weight
        vlb = (self.lvlb_weights[t] * error).mean()
        loss = simple + self.original_elbo_weight * vlb
        names = ("loss_simple", "loss_vlb", "loss")
        values = (error.mean(), vlb, loss)
        return loss, {f"{split}/{name}": v for name, v in zip(names, values, strict=True)}

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the UNet should predict."""
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise if self.parameterization == "eps" else x_start

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of images x (B, C, H, W) at timesteps that are drawn."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=self.device)
        return self.p_losses(x, t, *args, **kwargs)

    def shared_step(self, batch: Batch, **kwargs: Any) -> tuple[Tensor, Losses]:
        """Compute the loss of a batch, and its parts by name."""
        loss, parts = self(self.get_input(batch, self.first_stage_key))
        return loss, parts

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, some of whose conditions `ucg_training` replaces."""
        for key, dropout in self.ucg_training.items():
            value = "" if dropout["val"] is None else dropout["val"]
            for i in range(len(batch[key])):
                if self.ucg_prng.choice(2, p=[1 - dropout["p"], dropout["p"]]):
                    batch[key][i] = value
        loss, parts = self.shared_step(batch)
        self.log_dict(parts, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        step = torch.tensor(float(self.global_step))
        self.log("global_step", step, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        if self.use_scheduler:
            rate = self.optimizers().param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss of a batch, with the weights and with their average."""
        _, parts = self.shared_step(batch)
        with self.ema_scope():
            _, averaged = self.shared_step(batch)
        parts |= {f"{name}_ema": value for name, value in averaged.items()}
        self.log_dict(parts, prog_bar=False, logger=True, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW over the UNet, with `learning_rate`, an attribute that callers set."""
        parameters = [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    def _at(self, table: str, t: Tensor, x: Tensor) -> Tensor:
        """Return the values of a table at timesteps t (B,), for a product with x (B, …)."""
        return extract_into_tensor(getattr(self, table), t, x.shape)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Compute the divergence of x_T from the standard normal, (B,), in bits per value."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)


def _fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of other shapes than ours, repeated or cut in the first two axes.

    As in the original, a weight is divided by one more than the number of places that take it.
    """
    fitted = {}
    for name, target in own.items():
        old = state.get(name)
        if old is None or old.shape == target.shape:
            continue
        if old.dim() != target.dim() or old.shape[2:] != target.shape[2:]:
            raise ValueError(f"`{name}` of shape {tuple(old.shape)} fits no {tuple(target.shape)}")
        value = old[torch.arange(len(target)) % len(old)]
        if old.dim() > 1:
            columns = torch.arange(target.shape[1]) % old.shape[1]
            uses = 1 + torch.bincount(columns, minlength=old.shape[1])
            shape = (1, -1, *(1,) * (old.dim() - 2))
            value = value[:, columns] / uses[columns].reshape(shape)
        fitted[name] = value
    return fitted
