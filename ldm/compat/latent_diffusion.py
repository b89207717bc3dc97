"""LatentDiffusion of the original: DDPM in the latents of an autoencoder, with a condition."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.compat.autoencoder import VQModelInterface
from ldm.compat.ddpm_base import DDPM, Batch, Config, Losses
from ldm.compat.ddpm_images import ImageLogging
from ldm.compat.ddpm_patches import PatchProcessing
from ldm.compat.distributions import DiagonalGaussianDistribution
from ldm.compat.sampling import Condition, slice_condition
from ldm.compat.util import disabled_train, instantiate_from_config, to_builtin

FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
TEXT_KEYS = ("caption", "coordinates_bbox", "txt")
CLASS_KEYS = ("class_label", "cls")


class LatentDiffusion(PatchProcessing, ImageLogging):
    """A latent diffusion model with the original's interface.

    Third-party code subclasses it, overrides its methods, and monkeypatches them.

    Args:
        first_stage_config: Config of the autoencoder.
        cond_stage_config: Config of the conditioning encoder, "__is_first_stage__" for the
            autoencoder, or "__is_unconditional__" for no encoder.
        num_timesteps_cond: Number of noise levels of the condition; None or 1 = no noise.
        cond_stage_key: Batch key of the condition.
        concat_mode: Whether `conditioning_key` None means "concat", else "crossattn".
        cond_stage_forward: Method of the encoder to call; None = `encode`.
        conditioning_key: See `DiffusionWrapper`, and `concat_mode`.
        scale_by_std: Whether to measure the scale factor on the first training batch.
        force_null_conditioning: Whether to keep `conditioning_key` without an encoder; `get_input`
            then returns the condition None.
        args, kwargs: Arguments of DDPM; `timesteps` is required, as a keyword.
    """

    def __init__(
        self,
        first_stage_config: Config,
        cond_stage_config: Config,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        force_null_conditioning: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # Set before the constructor of DDPM, whose `register_schedule` reads them.
        self.force_null_conditioning = force_null_conditioning
        self.num_timesteps_cond = 1 if num_timesteps_cond is None else num_timesteps_cond
        self.scale_by_std = scale_by_std
        if self.num_timesteps_cond > kwargs["timesteps"]:
            raise ValueError(
                f"num_timesteps_cond must be at most {kwargs['timesteps']}, "
                f"got {self.num_timesteps_cond}"
            )
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == UNCONDITIONAL and not force_null_conditioning:
            conditioning_key = None
        # The checkpoint is loaded at the end, after the autoencoder and the encoder are built.
        ckpt_path = kwargs.pop("ckpt_path", None)
        ignore_keys = kwargs.pop("ignore_keys", ())
        reset_ema = kwargs.pop("reset_ema", False)
        reset_updates = kwargs.pop("reset_num_ema_updates", False)
        kwargs["conditioning_key"] = conditioning_key
        super().__init__(*args, **kwargs)
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.num_downs = _count_downsamplings(first_stage_config)
        self.scale_factor: float | Tensor
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(scale_factor))
        else:
            self.scale_factor = scale_factor
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        self.cond_stage_forward = cond_stage_forward
        self.clip_denoised = False  # latents have no bounds
        self.restarted_from_ckpt = ckpt_path is not None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)
            self.restart_ema(reset_ema, reset_updates)

    def update_cond_schedule(self) -> None:
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.make_cond_schedule()

    def make_cond_schedule(self) -> None:
        """Set `cond_ids`, the timestep of the condition's noise at each timestep."""
        last = self.num_timesteps - 1
        self.cond_ids = torch.full((self.num_timesteps,), last, dtype=torch.long)
        cond_timesteps = torch.linspace(0, last, self.num_timesteps_cond).round().long()
        self.cond_ids[: self.num_timesteps_cond] = cond_timesteps

    def instantiate_first_stage(self, config: Config) -> None:
        """Build the autoencoder, frozen."""
        self.first_stage_model: Any = freeze(instantiate_from_config(config))

    def instantiate_cond_stage(self, config: Config) -> None:
        """Build the conditioning encoder, frozen unless `cond_stage_trainable`."""
        if config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        elif config == UNCONDITIONAL:
            self.cond_stage_model = None
        else:
            encoder = instantiate_from_config(config)
            self.cond_stage_model = encoder if self.cond_stage_trainable else freeze(encoder)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """With `scale_by_std`, measure the scale factor on the first training batch.

        Lightning 1 passes `dataloader_idx`, Lightning 2 does not.
        """
        is_first_batch = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        if not self.scale_by_std or not is_first_batch or self.restarted_from_ckpt:
            return
        if float(self.scale_factor) != 1.0:
            raise ValueError("scale_by_std needs a scale_factor of 1")
        x = DDPM.get_input(self, batch, self.first_stage_key).to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        del self.scale_factor
        self.register_buffer("scale_factor", 1.0 / z.flatten().std())

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode images (B, 3, H, W) by the autoencoder, to a posterior or a tensor."""
        if self.uses_patches:
            return self.encode_patches(x)
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """Scale latents: a sample of a posterior, or a tensor."""
        if isinstance(encoder_posterior, Tensor):
            return self.scale_factor * encoder_posterior
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            return self.scale_factor * encoder_posterior.sample()
        raise NotImplementedError(
            f"encoder_posterior of type `{type(encoder_posterior)}` not yet implemented"
        )

    @torch.no_grad()
    def decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """Decode latents (B, C, h, w) to images, not clamped.

        Args:
            predict_cids: Whether z are codebook ids, or their logits (B, C, h, w).
            force_not_quantize: Whether a VQ autoencoder decodes z without quantization.
        """
        if predict_cids:
            ids = z.exp().argmax(dim=1) if z.dim() == 4 else z
            z = self.first_stage_model.quantize.get_codebook_entry(ids, shape=None)
            z = z.movedim(-1, 1).contiguous()
        z = 1.0 / self.scale_factor * z  # as in the original: z / scale_factor rounds differently
        decode: Callable[..., Tensor] = self.first_stage_model.decode
        if isinstance(self.first_stage_model, VQModelInterface):
            decode = partial(decode, force_not_quantize=predict_cids or force_not_quantize)
        return self.decode_patches(decode, z) if self.uses_patches else decode(z)

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode conditions, such as a list of prompts."""
        encoder: Any = self.cond_stage_model
        if self.cond_stage_forward is not None:
            return getattr(encoder, self.cond_stage_forward)(c)
        encode = getattr(encoder, "encode", None)
        c = encode(c) if callable(encode) else encoder(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """Encode the unconditional (negative) condition for a batch.

        Args:
            null_label: A list of one prompt, such as [""]; None = the unconditional class of a
                class-conditional model.
        """
        if null_label is None:
            if self.cond_stage_key not in CLASS_KEYS:
                raise NotImplementedError(
                    f"a null_label is needed with cond_stage_key `{self.cond_stage_key}`"
                )
            encoder: Any = self.cond_stage_model
            labels = encoder.get_unconditional_conditioning(batch_size, device=self.device)
            return self.get_learned_conditioning(labels)
        null_label = to_builtin(null_label)
        if isinstance(null_label, Tensor):
            null_label = null_label.to(self.device)
        return _repeat_sample(self.get_learned_conditioning(null_label), batch_size)

    @torch.no_grad()
    def get_input(  # type: ignore[override]  # more parameters
        self,
        batch: Batch,
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> Any:
        """Encode a batch.

        Args:
            k: Batch key of the images.
            return_first_stage_outputs: Whether to return the images and their reconstructions.
            force_c_encode: Whether to encode the condition even if its encoder is trained; else
                `forward` encodes it.
            cond_key: Batch key of the condition; None = `cond_stage_key`.
            return_original_cond: Whether to return the condition before encoding.
            bs: Number of samples to use; None = all.
            return_x: Whether to return the images.

        Returns:
            [z, c, …]: latents and condition; then, if requested, images and reconstructions,
            images, and the condition before encoding.
        """
        x = DDPM.get_input(self, batch, k)[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        c, original_cond = None, None
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            original_cond = self._read_condition(batch, cond_key or self.cond_stage_key, x)
            c = original_cond
            if not self.cond_stage_trainable or force_c_encode:
                if isinstance(c, Tensor):
                    c = c.to(self.device)
                c = self.get_learned_conditioning(c)
            if bs is not None:
                c = slice_condition(c, bs)
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_x:
            out.append(x)
        if return_original_cond:
            out.append(original_cond)
        return out

    def _read_condition(self, batch: Batch, key: str, x: Tensor) -> Any:
        if key == self.first_stage_key:
            return x
        if key in TEXT_KEYS:
            return batch[key]
        if key in CLASS_KEYS:
            return batch
        return DDPM.get_input(self, batch, key).to(self.device)

    def apply_model(
        self, x_noisy: Tensor, t: Tensor, cond: Condition, return_ids: bool = False
    ) -> Any:
        """Run the UNet.

        Args:
            cond: Keyword arguments of `DiffusionWrapper.forward`. A tensor or list becomes
                `c_concat` if `conditioning_key` is "concat", else `c_crossattn`.
            return_ids: Whether to return a tuple that the UNet returns, instead of its first item.
        """
        if not isinstance(cond, dict):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: cond if isinstance(cond, list) else [cond]}
        if self.uses_patches:
            return self.apply_to_patches(x_noisy, t, cond)
        out = self.model(x_noisy, t, **cond)
        return out[0] if isinstance(out, tuple) and not return_ids else out

    def forward(self, x: Tensor, c: Condition, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of latents x (B, C, h, w) at random timesteps."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=self.device).long()
        if self.model.conditioning_key is not None:
            if c is None:
                raise TypeError("this model needs a condition")
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            if self.shorten_cond_schedule:
                c = self.q_sample(c, self.cond_ids[t.cpu()].to(t), torch.randn_like(c.float()))
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(  # type: ignore[override]  # another order of parameters, as in the original
        self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        """Compute the loss at timesteps t (B,), and the losses to log; None draws the noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_noisy = self.q_sample(x_start=x_start, t=t, noise=noise)
        output = self.apply_model(x_noisy, t, cond)
        target = self.compute_target(x_start, noise, t)
        loss_simple = self.get_loss(output, target, mean=False).mean((1, 2, 3))  # (B,)
        logvar = self.logvar.to(t.device)[t].to(self.device)
        loss = loss_simple / logvar.exp() + logvar
        split = "train" if self.training else "val"
        loss_dict = {f"{split}/loss_simple": loss_simple.mean()}
        if self.learn_logvar:
            loss_dict |= {f"{split}/loss_gamma": loss.mean(), "logvar": self.logvar.data.mean()}
        # `get_loss` is called a second time, as in the original: third-party code replaces it.
        vlb = self.get_loss(output, target, mean=False).mean((1, 2, 3))
        vlb = (self.lvlb_weights[t] * vlb).mean()
        loss = self.l_simple_weight * loss.mean() + self.original_elbo_weight * vlb
        return loss, loss_dict | {f"{split}/loss_vlb": vlb, f"{split}/loss": loss}

    def shared_step(self, batch: Batch, **kwargs: Any) -> tuple[Tensor, Losses]:
        """Compute the loss of a batch, and the losses to log."""
        x, c = self.get_input(batch, self.first_stage_key)
        loss, loss_dict = self(x, c)
        return loss, loss_dict

    def configure_optimizers(self) -> Any:
        """Return AdamW for all trained weights; callers must have set `learning_rate`.

        With a `scheduler_config`, return also its learning rate schedule, in Lightning's format.
        """
        parameters = list(self.model.parameters())
        if self.cond_stage_trainable and self.cond_stage_model is not None:
            parameters += self.cond_stage_model.parameters()
        if self.learn_logvar:
            assert isinstance(self.logvar, nn.Parameter)
            parameters.append(self.logvar)
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate)
        if not self.use_scheduler:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]


def freeze(module: nn.Module) -> nn.Module:
    """Set a module to eval mode permanently, and disable gradients."""
    module.eval().requires_grad_(False)
    # `train` of the model calls `train` of its submodules, which must have no effect here.
    module.train = partial(disabled_train, module)  # type: ignore[method-assign]
    return module


def _count_downsamplings(config: Config) -> int:
    """Return how many times an autoencoder halves the image size; 0 if its config does not tell."""
    params = config.get("params") or {}
    ddconfig = params.get("ddconfig") or {}
    return len(ddconfig.get("ch_mult") or (1,)) - 1


def _repeat_sample(c: Any, n: int) -> Any:
    """Repeat the condition of one sample n times."""
    if isinstance(c, Mapping):
        return {key: _repeat_sample(value, n) for key, value in c.items()}
    if isinstance(c, list):
        return [_repeat_sample(value, n) for value in c]
    return c.expand(n, *c.shape[1:]).clone() if len(c) == 1 else c
