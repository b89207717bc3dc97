"""Training an autoencoder on pixels.

    Reconstruction    differences of pixels only: needs nothing else, and is enough for small ones
    Adversarial       the original's: pixels, LPIPS, and a discriminator that joins in late

Esser et al. 2020 (arXiv:2012.09841), section 3.1; Rombach et al. 2022 (arXiv:2112.10752), G.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ldm.loading.addons.lpips import LPIPS_FILES, build_lpips, read_lpips
from ldm.loading.config import instantiate
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.legacy import loss_weights
from ldm.nets.autoencoder import AutoencoderKL
from ldm.nets.discriminator import PatchDiscriminator
from ldm.nets.lpips import LPIPS
from ldm.runtime.errors import unknown_name
from ldm.runtime.files import find_file

__all__ = ["Adversarial", "Reconstruction", "normalise", "psnr", "task"]

GREATEST = 1e4  # adaptive weight
TINY = 1e-4


def task(
    model: AutoencoderKL,
    params: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    weights: bool = True,
) -> "Reconstruction | Adversarial":
    """How `model` is trained: as its `lossconfig` says, or on pixels only if that says nothing.

        params: of the model in the config. Its `ckpt_path` gives weights of losses, if it has any.
        options: `lightning.objective`, the keywords of Reconstruction or Adversarial; the latter's
            `perceptual` is {ckpt_path: a file or several}, see `ldm.loading.addons.lpips`.
        weights: False leaves out those of the losses' networks, for who wants their sizes only.
    Raises ValueError for unknown losses and keywords, or if LPIPS is needed and not at hand.
    """
    spec = params.get("lossconfig") or {"target": "torch.nn.Identity"}
    losses = instantiate(spec, where="model.params.lossconfig")
    kind = Adversarial if isinstance(losses, LossConfig) else Reconstruction
    keywords = inspect.signature(kind).parameters.values()
    known = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise unknown_name("keyword", key, known, "lightning.objective")
    if not isinstance(losses, LossConfig):
        return Reconstruction(model, **options)
    start = _starting_losses(params) if weights else {}
    options = {"learn_logvar": params.get("learn_logvar", False), **options}
    given = options.pop("perceptual", None) or {"ckpt_path": None}
    if not isinstance(given, Mapping) or list(given) != ["ckpt_path"]:
        raise ValueError("lightning.objective.perceptual must be {ckpt_path: a file or several}")
    path = given["ckpt_path"]
    found = (read_lpips(path) if path else build_lpips(start)) if weights else LPIPS()
    made = Adversarial(model, losses, perceptual=found, **options)
    made.start_from(start)
    return made


class Reconstruction:
    """Trains an AutoencoderKL on differences of pixels.

    l1, l2: weights of the absolute and the squared error, means over all values in [-1, 1].
    gradient: weight of the absolute error of differences between neighbours: sharp edges.
    kl: weight of the divergence from a standard normal, in nats per image.
    trained: "all", or "decoder": latents stay what they are.
    """

    rival = None

    def __init__(
        self,
        model: AutoencoderKL,
        *,
        l1: float = 1.0,
        l2: float = 1.0,
        gradient: float = 0.5,
        kl: float = 1e-6,
        trained: str = "all",
    ) -> None:
        self.model = self.trained = model
        self.l1, self.l2, self.gradient, self.kl = l1, l2, gradient, kl
        self.keeps_latents = _freeze(model, trained)
        self.step = 0

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """{"loss", "psnr", "kl"} of a batch of images ("jpg")."""
        image = batch["jpg"].to(self.model.quant_conv.weight.device)  # (B, 3, H, W)
        made, posterior = self.model(image, generator)
        error = made.float() - image
        kl = posterior.kl().float().mean()
        loss = self.l1 * error.abs().mean() + self.l2 * error.square().mean()
        loss = loss + self.gradient * _edges(error) + self.kl * kl
        return {"loss": loss, "psnr": psnr(made.detach().float(), image).mean(), "kl": kl.detach()}

    @torch.inference_mode()
    def weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """The model with latents normalised on these images (3, H, W): mean 0, std 1.

        If only the decoder was trained, the model as it is.
        """
        if self.keeps_latents:
            return self.model.state_dict()
        device = self.model.quant_conv.weight.device
        z = [self.model.encode(image[None].to(device)).mode() for image in images]
        model = copy.deepcopy(self.model)
        normalise(model, torch.cat(z))
        return model.state_dict()


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Parameters of the original's `lossconfig`.

    disc_start: steps before the discriminator counts. disc_factor: 0 leaves it out.
    disc_weight: its share beside the reconstruction, in gradients of the last layer.
    disc_num_layers, disc_in_channels: see PatchDiscriminator. disc_loss: hinge | vanilla.
    kl_weight: of nats per image. perceptual_weight: of LPIPS beside the absolute error.
    logvar_init: log of the variance of an error.
    pixelloss_weight, use_actnorm, disc_conditional: without effect, the latter two must be false.
    """

    disc_start: int
    logvar_init: float = 0.0
    kl_weight: float = 1.0
    pixelloss_weight: float = 1.0
    disc_num_layers: int = 3
    disc_in_channels: int = 3
    disc_factor: float = 1.0
    disc_weight: float = 1.0
    perceptual_weight: float = 1.0
    use_actnorm: bool = False
    disc_conditional: bool = False
    disc_loss: str = "hinge"

    def __post_init__(self) -> None:
        if self.use_actnorm or self.disc_conditional:
            raise ValueError("`use_actnorm` and `disc_conditional` can only be false")
        if self.disc_loss not in DISC_LOSSES:
            known = ", ".join(DISC_LOSSES)
            raise ValueError(f"unknown disc_loss `{self.disc_loss}`, choose one of {known}")


class Adversarial:
    """Trains an AutoencoderKL as the original did, and a discriminator (`rival`) against it.

        perceptual: LPIPS; may be None if its weight is 0.
        trained: "all", or "decoder": latents stay what they are.
        learn_logvar: train the variance of an error too, for which a sum of errors is weighed.
        export_losses: the exported file has `loss.*` as well, as the original's has.

    Errors are summed over an image, not averaged: hence the small weights and learning rates of
    the original's configs.
    """

    betas = (0.5, 0.9)  # of Adam, for both

    def __init__(
        self,
        model: AutoencoderKL,
        losses: LossConfig,
        *,
        perceptual: LPIPS | None = None,
        trained: str = "all",
        learn_logvar: bool = False,
        export_losses: bool = False,
    ) -> None:
        if losses.perceptual_weight and perceptual is None:
            raise ValueError(
                f"perceptual_weight {losses.perceptual_weight:g} needs the weights of LPIPS: "
                f"`lightning.objective.perceptual.ckpt_path` must name {LPIPS_FILES}; or set "
                "`model.params.lossconfig.params.perceptual_weight=0`"
            )
        _freeze(model, trained)
        device = model.quant_conv.weight.device
        self.model, self.losses, self.export_losses = model, losses, export_losses
        with_lpips = perceptual is not None and losses.perceptual_weight
        self.perceptual = _moved(perceptual, device) if with_lpips else None
        self.rival = _moved(
            PatchDiscriminator(in_channels=losses.disc_in_channels, layers=losses.disc_num_layers),
            device,
        )
        logvar = torch.tensor(losses.logvar_init, device=device)
        self.logvar = nn.Parameter(logvar, requires_grad=learn_logvar)
        self._learned = [self.logvar] if learn_logvar else []
        self.trained: nn.Module = model
        if learn_logvar:
            self.trained = nn.ModuleDict({"model": model})
            self.trained.register_parameter("logvar", self.logvar)
        self.step = 0

    @property
    def competes(self) -> bool:
        """Whether the discriminator counts yet; before that, training it changes nothing."""
        return self.losses.disc_factor > 0 and self.step >= self.losses.disc_start

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Of the autoencoder, for a batch of images ("jpg"); names of the parts are the original's.

        nll + kl_weight kl + d_weight g, where g = -mean(logits) of the discriminator and d_weight
        makes the gradients of nll and g in the last layer equally long, times disc_weight.

        Each of the two is differentiated once, down to the image that was made; their sum goes on
        from there. So neither needs the weights of the last layer, which may be split over ranks.
        """
        image, losses = self._image(batch), self.losses  # (B, 3, H, W)
        with _input_of(self.model.decoder.conv_out) as seen:
            made, posterior = self.model(image, generator)
        leaf = made.detach().float().requires_grad_(torch.is_grad_enabled())  # (B, 3, H, W)
        rec, nll = self._nll(image, leaf)
        g, kl = -self.rival(leaf).float().mean(), posterior.kl().float().mean()
        factor, d_weight = self._factor(), torch.zeros_like(kl)
        gradients: list[tuple[Tensor, Tensor | float]] = [(kl, losses.kl_weight)]
        if torch.is_grad_enabled():  # not where a trained model is only looked at
            grad, *others = torch.autograd.grad(nll, [leaf, *self._learned])
            if losses.disc_factor > 0:
                (grad_g,) = torch.autograd.grad(g, leaf)
                d_weight = losses.disc_weight * self._balance(seen[0], leaf.detach(), grad, grad_g)
                grad = grad + factor * d_weight * grad_g
            gradients += [(made, grad), *zip(self._learned, others, strict=True)]
        total = nll + losses.kl_weight * kl + factor * d_weight * g
        parts = {
            "nll_loss": nll, "rec_loss": rec, "kl_loss": kl, "g_loss": g, "d_weight": d_weight,
            "disc_factor": g.new_tensor(factor), "logvar": self.logvar.clone(),
            "psnr": psnr(leaf, image).mean(),
        }  # fmt: skip
        logged = {name: value.detach() for name, value in parts.items()}
        return {"loss": _with_gradients(total, gradients), **logged}

    def rival_loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Of the discriminator, which is 0 until it `competes`."""
        image = self._image(batch)  # (B, 3, H, W)
        with torch.no_grad():
            made, _ = self.model(image, generator)
        real, fake = self.rival(image).float(), self.rival(made.float()).float()  # (B, 1, h, w)
        loss = self._factor() * DISC_LOSSES[self.losses.disc_loss](real, fake)
        parts = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def start_from(self, losses: Mapping[str, Tensor]) -> None:
        """Takes over discriminator and variance from a file (`legacy.losses`) that has them.

        Raises ValueError if its discriminator has other layers.
        """
        start = "discriminator."
        state = {n.removeprefix(start): v for n, v in losses.items() if n.startswith(start)}
        shapes = {name: value.shape for name, value in self.rival.state_dict().items()}
        if state and {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError(
                "the discriminator of the checkpoint has other layers than `lossconfig` says\n"
                "hint: `ignore_keys: [loss]` starts with a new one"
            )
        if state:
            self.rival.load_state_dict(state)
        if "logvar" in losses:
            self.logvar.data.copy_(losses["logvar"])

    def weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """The model as it is; the training of a diffusion model measures its `scale_factor`."""
        state = dict(self.model.state_dict())
        if self.export_losses:
            parts = {"discriminator": self.rival, "perceptual_loss": self.perceptual}
            for name, part in parts.items():
                if part is not None:
                    state |= {f"loss.{name}.{n}": v for n, v in part.state_dict().items()}
            state["loss.logvar"] = self.logvar.detach()
        return state

    def _factor(self) -> float:
        return self.losses.disc_factor if self.competes else 0.0

    def _image(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["jpg"].to(self.logvar.device)  # (B, 3, H, W)

    def _nll(self, image: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """The mean error, and the negative log likelihood of an image, in units of a Laplacian."""
        error = (image - made).abs()  # (B, 3, H, W)
        if self.perceptual is not None:
            lpips = self.perceptual(image, made).float()  # (B, 1, 1, 1)
            error = error + self.losses.perceptual_weight * lpips
        nll = error / self.logvar.exp() + self.logvar
        return error.mean(), nll.sum() / len(image)

    def _balance(self, h: Tensor, made: Tensor, grad: Tensor, grad_g: Tensor) -> Tensor:
        """|grad nll| / |grad g| with respect to the weights of the last layer.

        h: what went into it. grad, grad_g: with respect to `made`, the image that came out.
        """
        decoder = self.model.decoder
        shape = decoder.conv_out.weight.shape
        slope = 1 - made.square() if decoder.tanh_out else torch.ones_like(made)
        nll, g = (
            conv2d_weight(h.float(), shape, slope * d, padding=1).norm() for d in (grad, grad_g)
        )
        return (nll / (g + TINY)).clamp(max=GREATEST)


def psnr(made: Tensor, image: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [-1, 1], decibels, (B,)."""
    error = (made.clamp(-1, 1) - image).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


@torch.no_grad()
def normalise(model: AutoencoderKL, z: Tensor) -> None:
    """Folds mean and standard deviation of every latent channel into the 1x1 convolutions.

    z: (N, C, h, w) latents of the model. Afterwards its latents have mean 0 and std 1 (so the
    scale factor is 1) and decode to the same images.
    """
    channels = z.shape[1]
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    after, before = model.quant_conv, model.post_quant_conv
    assert after.bias is not None
    assert before.bias is not None
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= std[None, :, None, None]
    after.weight[:channels] /= std[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - mean) / std
    after.bias[channels:] -= 2 * std.log()  # the log variance scales with the square


def _moved(module: Any, device: torch.device) -> Any:
    """On the device; fake tensors, as `--dry-run` has, cannot be moved, and need not be."""
    return module if next(module.parameters()).device == device else module.to(device)


def _edges(error: Tensor) -> Tensor:
    down = error[..., 1:, :] - error[..., :-1, :]
    right = error[..., :, 1:] - error[..., :, :-1]
    return down.abs().mean() + right.abs().mean()


def _freeze(model: AutoencoderKL, trained: str) -> bool:
    """Whether only the decoder is trained; then freezes what makes latents."""
    if trained not in ("all", "decoder"):
        raise ValueError(f"lightning.objective.trained is `{trained}`, choose one of all, decoder")
    if trained == "decoder":
        for part in (model.encoder, model.quant_conv):
            part.requires_grad_(False)
    return trained == "decoder"


def _starting_losses(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """`loss.*` of the checkpoint that the model starts from, without `ignore_keys`."""
    if not params.get("ckpt_path"):
        return {}
    ignored = tuple(params.get("ignore_keys") or ())
    state = read_checkpoint(find_file(params["ckpt_path"])).state
    return loss_weights({n: v for n, v in state.items() if not n.startswith(ignored)})


@contextmanager
def _input_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what goes into a layer while inside."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def _with_gradients(value: Tensor, gradients: Sequence[tuple[Tensor, Tensor | float]]) -> Tensor:
    """A number equal to `value` whose gradient with respect to each tensor is what stands by it."""
    linear = torch.stack([(tensor * gradient).sum() for tensor, gradient in gradients]).sum()
    return value.detach() + (linear - linear.detach())


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def _vanilla(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISC_LOSSES = {"hinge": _hinge, "vanilla": _vanilla}
