"""Training of an autoencoder.

    ReconstructionTask   pixel losses + regularization, without other networks; sufficient for
                         small models
    AdversarialTask      as in the original, CompVis' ldm: L1 + LPIPS, summed over an image, + KL,
                         and a GAN loss from step `disc_start` on
    VQAdversarialTask    as in taming-transformers: L1 or L2 + LPIPS, averaged over an image, +
                         quantization loss, and the same GAN loss

The regularization is the KL divergence or, of VQ autoencoders, the quantization loss.
Esser et al. 2021 (arXiv:2012.09841), section 3.1; Rombach et al. 2022 (arXiv:2112.10752),
appendix G.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ldm.loading.addons.lpips import LPIPS_FILES, build_lpips, read_lpips
from ldm.loading.config import instantiate
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.published import resolve_checkpoint
from ldm.loading.weight_names import select_loss_state, select_prefix
from ldm.nets.autoencoder import Autoencoder, AutoencoderKL, AutoencoderVQ, DiagonalGaussian
from ldm.nets.blocks import GroupNorm
from ldm.nets.discriminator import PatchDiscriminator
from ldm.nets.lpips import LPIPS
from ldm.nets.quantizer import Quantized
from ldm.runtime.errors import check_name, check_names
from ldm.runtime.files import find_file
from ldm.runtime.types import JsonMapping
from ldm.train.tasks.task import Batch, Losses, Task

__all__ = [
    "AdversarialLossConfig", "AdversarialTask", "ReconstructionTask", "VQAdversarialTask",
    "VQLossConfig", "build_autoencoder_task", "compute_psnr", "normalize_latents",
]  # fmt: skip

# Maximum of the adaptive weight of the GAN loss, the original's `d_weight`, and what is added to
# its denominator.
MAX_D_WEIGHT = 1e4
D_WEIGHT_EPS = 1e-4
TOP_ERRORS_DIVISOR = 500  # the largest 1 / 500 of the errors have a loss of their own
MAX_ACTIVATION = 6.0  # largest normalized activation without penalty
# Penalties of logits that should be negative, by `disc_loss`.
DISC_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda logits: F.relu(1 + logits),
    "vanilla": F.softplus,
}
PIXEL_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}
# Parameters of VQ models that only have their default here.
UNSUPPORTED_PARAMS = {"lr_g_factor": 1.0, "batch_resize_range": None, "use_ema": False}
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def build_autoencoder_task(
    model: Autoencoder,
    params: JsonMapping,
    objective: JsonMapping,
    *,
    load_weights: bool = True,
) -> "ReconstructionTask | AdversarialTask":
    """Build the task of the `lossconfig` of a model; without one, ReconstructionTask.

    Args:
        params: `model.params`; the file `ckpt_path` may have the state of the loss: `loss.…`.
        objective: `lightning.objective`, keyword arguments of the task; `perceptual` is
            {ckpt_path: files of LPIPS}.
        load_weights: Whether to load LPIPS; False = random weights.
    """
    spec = params.get("lossconfig") or {"target": "torch.nn.Identity"}
    config = instantiate(spec, where="model.params.lossconfig")
    is_adversarial = isinstance(config, BaseLossConfig)
    is_vq = isinstance(model, AutoencoderVQ)
    if is_adversarial and isinstance(config, VQLossConfig) != is_vq:
        fitting = "a VQ autoencoder" if isinstance(config, VQLossConfig) else "an AutoencoderKL"
        raise ValueError(f"model.params.lossconfig: `{spec['target']}` is for {fitting}")
    for name, default in UNSUPPORTED_PARAMS.items():
        if params.get(name, default) != default:
            raise ValueError(f"model.params.{name}: only {default} is supported")
    task_fields = fields(AdversarialTask if is_adversarial else ReconstructionTask)
    unused = "kl_weight" if is_vq else "codebook_weight"
    keywords = [field.name for field in task_fields if field.kw_only and field.name != unused]
    where = f"lightning.objective (with{'' if is_adversarial else 'out'} a discriminator)"
    check_names("key", objective, keywords, where)
    if not is_adversarial:
        return ReconstructionTask(model, **objective)
    options = {"learn_logvar": params.get("learn_logvar", False), **objective}
    perceptual = options.pop("perceptual", None) or {"ckpt_path": None}
    if not isinstance(perceptual, Mapping) or list(perceptual) != ["ckpt_path"]:
        raise ValueError("lightning.objective.perceptual must be {ckpt_path: a file or several}")
    task_class = VQAdversarialTask if is_vq else AdversarialTask
    if not load_weights:
        return task_class(model, config, perceptual=LPIPS(), **options)
    loss_state = _read_loss_state(params)
    path = perceptual["ckpt_path"]
    network = read_lpips(path) if path else build_lpips(loss_state)
    task = task_class(model, config, perceptual=network, **options)
    task.load_loss_state(loss_state)
    return task


@dataclass(eq=False)
class ReconstructionTask(Task):
    """Training of an autoencoder on pixel errors of images in [-1, 1].

    Args:
        l1_weight: Weight of the mean absolute error.
        l2_weight: Weight of the mean squared error.
        image_gradient_weight: Weight of the absolute error of the image gradient, i.e. of edges.
        kl_weight: Weight of the KL divergence from a standard normal distribution, in nats per
            image; not for VQ autoencoders.
        codebook_weight: Weight of the quantization loss; for VQ autoencoders only.
        top_errors_weight: Weight of the mean of the largest 1 / 500 of absolute errors.
        outlier_weight: Weight of a penalty on huge activations in the decoder.
        trainable_part: Part to train: "all", or "decoder", which does not change the latents.
    """

    model: Autoencoder
    _: KW_ONLY
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    image_gradient_weight: float = 0.5
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    top_errors_weight: float = 0.0
    outlier_weight: float = 0.0
    trainable_part: str = "all"

    def __post_init__(self) -> None:
        self.trainable = self.model
        _freeze_encoder(self.model, self.trainable_part)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        image = batch["jpg"].to(self.model.quant_conv.weight.device)  # (B, 3, H, W)
        layers = self.model.decoder.modules() if self.outlier_weight else ()
        with _record_outputs(layer for layer in layers if isinstance(layer, GroupNorm)) as outputs:
            reconstruction, latent = self.model(image, generator)
        error = reconstruction.float() - image
        regularization, terms = _compute_regularization(self.model, latent)
        is_vq = isinstance(latent, Quantized)
        edges = error.diff(dim=-2).abs().mean() + error.diff(dim=-1).abs().mean()
        loss = self.l1_weight * error.abs().mean() + self.l2_weight * error.square().mean()
        weight = self.codebook_weight if is_vq else self.kl_weight
        loss = loss + self.image_gradient_weight * edges + weight * regularization
        if self.top_errors_weight:
            errors = error.abs().flatten(1)
            largest = errors.topk(max(1, errors.shape[1] // TOP_ERRORS_DIVISOR)).values
            loss = loss + self.top_errors_weight * largest.mean()
        if self.outlier_weight:
            loss = loss + self.outlier_weight * _compute_outlier_loss(outputs)
        mean_psnr = compute_psnr(reconstruction.detach().float(), image).mean()
        # Without the suffix of the original's names.
        logged = {name.removesuffix("_loss"): value.detach() for name, value in terms.items()}
        return {"loss": loss, "psnr": mean_psnr, **logged}

    @torch.inference_mode()
    def get_weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the weights; the latents of an AutoencoderKL are normalized.

        They are not if only the decoder is trained, as they belong to another model then.
        """
        if self.trainable_part == "decoder" or not isinstance(self.model, AutoencoderKL):
            return self.model.state_dict()
        device = self.model.quant_conv.weight.device
        z = [self.model.encode(image[None].to(device)).mode() for image in images]
        model = copy.deepcopy(self.model)
        normalize_latents(model, torch.cat(z))
        return model.state_dict()


@dataclass(frozen=True, kw_only=True)
class BaseLossConfig:
    """Parameters that the adversarial losses of KL and VQ autoencoders have in common.

    Args:
        disc_start: First step with the discriminator.
        pixelloss_weight: Unused, as in the original.
        disc_factor: Weight of both GAN losses; 0 disables them.
        disc_weight: Gradient norm of the GAN loss at the last layer, relative to that of the nll.
        perceptual_weight: Weight of LPIPS, relative to the pixel error.
        disc_loss: "hinge" or "vanilla".
    """

    disc_start: int
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
        check_name("disc_loss", self.disc_loss, DISC_LOSSES)
        for field in fields(self):
            value = vars(self)[field.name]
            if field.type in (int, float) and not isinstance(value, int | float):
                raise ValueError(f"{field.name}: `{value}` should be a number")


@dataclass(frozen=True, kw_only=True)
class AdversarialLossConfig(BaseLossConfig):
    """Parameters of the original's LPIPSWithDiscriminator, a `lossconfig`.

    Args:
        kl_weight: Weight of the KL divergence, in nats per image.
    """

    logvar_init: float = 0.0
    kl_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class VQLossConfig(BaseLossConfig):
    """Parameters of the VQLPIPSWithDiscriminator of taming-transformers and of the original.

    Args:
        codebook_weight: Weight of the quantization loss.
        disc_ndf: Channels of the discriminator's first layer.
        n_classes: Vectors of the codebook; unused, as the model knows them.
        perceptual_loss: "lpips".
        pixel_loss: "l1" or "l2".
    """

    codebook_weight: float = 1.0
    disc_ndf: int = 64
    n_classes: int | None = None
    perceptual_loss: str = "lpips"
    pixel_loss: str = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("perceptual_loss", self.perceptual_loss, ("lpips",))
        check_name("pixel_loss", self.pixel_loss, PIXEL_LOSSES)


@dataclass(eq=False)
class AdversarialTask(Task):
    """Training of an AutoencoderKL against a discriminator, as in the original.

    Errors are summed over an image, not averaged.

    Args:
        perceptual: LPIPS; None if its weight is 0.
        trainable_part: Part to train: "all", or "decoder", which does not change the latents.
        learn_logvar: Whether to train the log variance of the error.
        export_losses: Whether to export discriminator, LPIPS and logvar, as `loss.*`.
    """

    betas: ClassVar[tuple[float, float] | None] = (0.5, 0.9)
    model: Autoencoder
    config: BaseLossConfig
    _: KW_ONLY
    perceptual: LPIPS | None = None
    trainable_part: str = "all"
    learn_logvar: bool = False
    export_losses: bool = False

    def __post_init__(self) -> None:
        model, config = self.model, self.config
        if config.perceptual_weight and self.perceptual is None:
            raise ValueError(
                f"perceptual_weight {config.perceptual_weight:g} needs the weights of LPIPS: "
                f"`lightning.objective.perceptual.ckpt_path` must name {LPIPS_FILES}; or set "
                "`model.params.lossconfig.params.perceptual_weight=0`"
            )
        _freeze_encoder(model, self.trainable_part)
        device = model.quant_conv.weight.device
        if self.perceptual is not None:
            self.perceptual = _move(self.perceptual, device) if config.perceptual_weight else None
        self.discriminator: PatchDiscriminator = _move(self._build_discriminator(), device)
        logvar_init = config.logvar_init if isinstance(config, AdversarialLossConfig) else 0.0
        logvar = torch.tensor(logvar_init, device=device)
        self.logvar = nn.Parameter(logvar, requires_grad=self.learn_logvar)
        self.trainable = model
        if self.learn_logvar:
            self.trainable = nn.ModuleDict({"model": model})
            self.trainable.register_parameter("logvar", self.logvar)

    @property
    def trains_discriminator(self) -> bool:
        # Before disc_start the discriminator's loss is 0: a step would have no effect.
        return self.config.disc_factor > 0 and self.step >= self.config.disc_start

    @property
    def _disc_factor(self) -> float:
        return self.config.disc_factor if self.trains_discriminator else 0.0

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Compute the losses of the autoencoder; the names of their terms are the original's.

            loss = nll + weight regularization + disc_factor d_weight g,    g = -mean(logits)

        where the regularization is KL or the quantization loss, and d_weight scales the gradient
        norm of g at the last layer to disc_weight times that of nll. For that, nll and g are each
        differentiated with respect to the reconstruction, and the weighted sum of these gradients
        is backpropagated from there.
        """
        image = batch["jpg"].to(self.logvar.device)  # (B, 3, H, W)
        config = self.config
        last_inputs: list[Tensor] = []  # [input of the last layer]
        last_layer = self.model.decoder.conv_out
        with last_layer.register_forward_pre_hook(lambda _, args: last_inputs.extend(args)):
            reconstruction, latent = self.model(image, generator)
        leaf = reconstruction.detach().float()  # (B, 3, H, W)
        leaf.requires_grad_(torch.is_grad_enabled())
        nll, error_terms = self._compute_nll(image, leaf)
        g = -self.discriminator(leaf).float().mean()
        regularization, terms = _compute_regularization(self.model, latent)
        factor, weight = self._disc_factor, self._regularization_weight
        d_weight = torch.zeros_like(regularization)
        gradients: list[tuple[Tensor, Tensor | float]] = [(regularization, weight)]
        if torch.is_grad_enabled():  # not in validation
            logvars = [self.logvar] if self.learn_logvar else []
            grad, *logvar_grads = torch.autograd.grad(nll, [leaf, *logvars])
            if config.disc_factor > 0:
                (grad_g,) = torch.autograd.grad(g, leaf)
                ratio = self._compute_gradient_ratio(
                    last_inputs[0].detach(), leaf.detach(), grad, grad_g
                )
                d_weight = config.disc_weight * ratio
                grad = grad + factor * d_weight * grad_g
            gradients += [(reconstruction, grad), *zip(logvars, logvar_grads, strict=True)]
        total = nll + weight * regularization + factor * d_weight * g
        terms = {
            "nll_loss": nll,
            **error_terms,
            **terms,
            "g_loss": g,
            "d_weight": d_weight,
            "disc_factor": g.new_tensor(factor),
        }
        if isinstance(config, AdversarialLossConfig):
            terms["logvar"] = self.logvar.clone()
        terms["psnr"] = compute_psnr(leaf, image).mean()
        logged = {name: value.detach() for name, value in terms.items()}
        return {"loss": _attach_gradients(total, gradients), **logged}

    def discriminator_loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Compute the losses of the discriminator; "loss" is 0 until `trains_discriminator`."""
        image = batch["jpg"].to(self.logvar.device)  # (B, 3, H, W)
        with torch.no_grad():
            reconstruction, _ = self.model(image, generator)
        real = self.discriminator(image).float()  # (B, 1, h, w)
        fake = self.discriminator(reconstruction.float()).float()  # (B, 1, h, w)
        penalty = DISC_LOSSES[self.config.disc_loss]
        loss = self._disc_factor * 0.5 * (penalty(-real).mean() + penalty(fake).mean())
        terms = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def load_loss_state(self, loss_state: Mapping[str, Tensor]) -> None:
        """Load discriminator and logvar, if `loss_state` (from `select_loss_state`) has them."""
        state = select_prefix(loss_state, "discriminator.")
        shapes = {name: value.shape for name, value in self.discriminator.state_dict().items()}
        if state and {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError(
                "the discriminator of the checkpoint does not match `lossconfig`\n"
                "hint: `ignore_keys: [loss]` starts with a new one"
            )
        if state:
            self.discriminator.load_state_dict(state)
        if "logvar" in loss_state:
            self.logvar.data.copy_(loss_state["logvar"])

    def get_weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the weights unchanged, with `loss.*` if `export_losses`."""
        state = dict(self.model.state_dict())
        if self.export_losses:
            networks = {"discriminator": self.discriminator, "perceptual_loss": self.perceptual}
            for name, network in networks.items():
                if network is not None:
                    state |= {f"loss.{name}.{n}": v for n, v in network.state_dict().items()}
            if isinstance(self.config, AdversarialLossConfig):
                state["loss.logvar"] = self.logvar.detach()
        return state

    @property
    def _regularization_weight(self) -> float:
        assert isinstance(self.config, AdversarialLossConfig)
        return self.config.kl_weight

    def _build_discriminator(self) -> PatchDiscriminator:
        config = self.config
        return PatchDiscriminator(
            in_channels=config.disc_in_channels, num_layers=config.disc_num_layers
        )

    def _compute_nll(
        self, image: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative log likelihood (Laplace) summed per image, and terms to log."""
        error = (image - reconstruction).abs()  # (B, 3, H, W)
        error = error + self._compute_perceptual_loss(image, reconstruction)
        nll = error / self.logvar.exp() + self.logvar
        return nll.sum() / len(image), {"rec_loss": error.mean()}

    def _compute_perceptual_loss(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the weighted LPIPS distances (B, 1, 1, 1)."""
        if self.perceptual is None:
            return image.new_zeros(len(image), 1, 1, 1)
        distance: Tensor = self.perceptual(image, reconstruction).float()
        return self.config.perceptual_weight * distance

    def _compute_gradient_ratio(
        self, last_input: Tensor, reconstruction: Tensor, grad_nll: Tensor, grad_g: Tensor
    ) -> Tensor:
        """Return |grad nll| / |grad g| of the last layer's weights, given its output gradients."""
        decoder = self.model.decoder
        shape = decoder.conv_out.weight.shape
        # The derivative of the tanh that may follow the last layer.
        slope = 1 - reconstruction.square() if decoder.tanh_out else torch.ones_like(reconstruction)
        nll_norm, g_norm = (
            conv2d_weight(last_input.float(), shape, slope * grad_output, padding=1).norm()
            for grad_output in (grad_nll, grad_g)
        )
        ratio: Tensor = (nll_norm / (g_norm + D_WEIGHT_EPS)).clamp(max=MAX_D_WEIGHT)
        return ratio


@dataclass(eq=False)
class VQAdversarialTask(AdversarialTask):
    """Training of a VQ autoencoder against a discriminator, as in taming-transformers.

    Unlike in `AdversarialTask`, errors are averaged over an image.
    """

    config: VQLossConfig

    @property
    def _regularization_weight(self) -> float:
        return self.config.codebook_weight

    def _build_discriminator(self) -> PatchDiscriminator:
        config = self.config
        return PatchDiscriminator(
            in_channels=config.disc_in_channels,
            num_layers=config.disc_num_layers,
            channels=config.disc_ndf,
        )

    def _compute_nll(
        self, image: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean error, and terms to log."""
        perceptual = self._compute_perceptual_loss(image, reconstruction)
        error = PIXEL_LOSSES[self.config.pixel_loss](image - reconstruction) + perceptual
        nll = error.mean()
        p_loss = perceptual.mean() / (self.config.perceptual_weight or 1.0)
        return nll, {"rec_loss": nll.clone(), "p_loss": p_loss}


def _compute_regularization(
    model: Autoencoder, latent: "DiagonalGaussian | Quantized"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the regularization of latents, the mean over the batch, and terms to log."""
    if isinstance(latent, DiagonalGaussian):
        kl = latent.kl().float().mean()
        return kl, {"kl_loss": kl}
    assert isinstance(model, AutoencoderVQ)
    indices = latent.indices.flatten()
    # Not by `bincount`, which fake tensors do not have; they estimate memory.
    counts = torch.zeros(model.quantize.embedding.num_embeddings, device=indices.device)
    counts = counts.index_add(0, indices, torch.ones_like(indices, dtype=counts.dtype))
    fractions = counts / counts.sum()
    entropy = -(fractions * (fractions + 1e-10).log()).sum()
    loss = latent.loss.float()
    num_used = counts.count_nonzero().float()  # losses are averaged
    return loss, {"quant_loss": loss, "perplexity": entropy.exp(), "cluster_usage": num_used}


def compute_psnr(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio (B,) of images in [-1, 1], in decibels."""
    error = (reconstruction.clamp(-1, 1) - image).square().mean(dim=(1, 2, 3))
    # At most 126 dB, for equal images.
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


@torch.no_grad()
def normalize_latents(model: AutoencoderKL, z: Tensor) -> None:
    """Fold mean and std of each channel of latents z (N, C, h, w) into the 1x1 convolutions.

    Afterwards latents have mean 0 and std 1 (scale factor 1), and decode to the same images.
    """
    channels = z.shape[1]
    mean = z.mean(dim=(0, 2, 3))
    std = z.std(dim=(0, 2, 3))
    quant, post_quant = model.quant_conv, model.post_quant_conv
    assert quant.bias is not None
    assert post_quant.bias is not None
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std[None, :, None, None]
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # a scale enters the log variance squared


def _move(module: ModuleT, device: torch.device) -> ModuleT:
    """Move a module, unless it is on the device: fake tensors of a dry run cannot be moved."""
    return module if next(module.parameters()).device == device else module.to(device)


@contextmanager
def _record_outputs(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the context, collect the outputs (B, C, H, W) of layers.

    A hook must not compute anything, as gradient checkpointing would not repeat that.
    """
    outputs: list[Tensor] = []

    def record(layer: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        outputs.append(output)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(record))
        yield outputs


def _compute_outlier_loss(outputs: Iterable[Tensor]) -> Tensor:
    """Return the mean over layers and channels of (maximum - 6) / 6, where it is positive.

    Group norms remove the scale of activations. A decoder can preserve it by a few huge ones in a
    corner, which dominate the variance and leave a blob there (Karras et al. 2020,
    arXiv:1912.04958, section 2).
    """
    maxima = [output.float().abs().amax(dim=(2, 3)) for output in outputs]
    return torch.stack([F.relu(maximum / MAX_ACTIVATION - 1).mean() for maximum in maxima]).mean()


def _freeze_encoder(model: Autoencoder, trainable_part: str) -> None:
    """Freeze the encoder if only the decoder is trained."""
    if trainable_part == "decoder":
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)


def _read_loss_state(params: JsonMapping) -> dict[str, Tensor]:
    """Read `loss.*` of the initial checkpoint, without `ignore_keys`."""
    if not params.get("ckpt_path"):
        return {}
    ignored = tuple(params.get("ignore_keys") or ())
    state = read_checkpoint(find_file(resolve_checkpoint(params["ckpt_path"]))).state_dict
    return select_loss_state({n: v for n, v in state.items() if not n.startswith(ignored)})


def _attach_gradients(value: Tensor, gradients: Sequence[tuple[Tensor, Tensor | float]]) -> Tensor:
    """Return a scalar equal to `value` whose backward pass gives each tensor its gradient."""
    linear = torch.stack([(tensor * gradient).sum() for tensor, gradient in gradients]).sum()
    return value.detach() + (linear - linear.detach())
