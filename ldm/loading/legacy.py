"""Every old name, in one place: dotted targets, the classes of the original, prefixes of weights.

    TARGETS   old dotted name -> ours                      a class that takes the YAML's keywords
    LIFTED    old family class -> function                 its parameters -> LatentDiffusion + parts
    PENDING   old name -> what serves it                   known, but not built by this version
    KEYS      old prefix <-> new prefix                    weights, used in both directions
    DERIVED   tensors recomputed here                      dropped on load, written on export

Tables, and functions with nothing clever in them. Inside the networks the original parameter names
are ours too, so nothing below those prefixes is renamed.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["rename", "rename_back", "translate", "unknown"]

log = logging.getLogger(__name__)

MODEL = "ldm.model.LatentDiffusion"
CONDITIONER = "ldm.conditioning.Conditioner"
SCHEDULE = "ldm.diffusion.schedule.Schedule"
BETAS = "ldm.diffusion.schedule.make_betas"
AUTOENCODER = "ldm.nets.autoencoder.AutoencoderKL"
PIXELS = "ldm.nets.autoencoder.PixelSpace"
UNET = "ldm.nets.unet.UNet"
OPEN_CLIP = "ldm.encoders.text.OpenCLIPText"
CLIP = "ldm.encoders.text.CLIPText"

TARGETS = {
    "ldm.models.autoencoder.AutoencoderKL": AUTOENCODER,
    "ldm.models.autoencoder.IdentityFirstStage": PIXELS,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": OPEN_CLIP,
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": CLIP,
    "sgm.models.autoencoder.AutoencoderKL": AUTOENCODER,
    "sgm.modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder": OPEN_CLIP,
    "sgm.modules.encoders.modules.FrozenCLIPEmbedder": CLIP,
    "torch.nn.Identity": "torch.nn.Identity",
}
OURS = frozenset({MODEL, CONDITIONER, SCHEDULE, BETAS, *TARGETS.values()})

# Known classes that this version does not build: what they are, and the script that will.
PENDING = {
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": ("inpainting", "scripts/inpaint.py"),
    "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion": ("depth", "scripts/depth2img.py"),
    "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion": ("x4 upscaling", "scripts/upscale.py"),
    "ldm.models.diffusion.ddpm.LatentUpscaleFinetuneDiffusion": (
        "upscaling fine-tune",
        "scripts/upscale.py",
    ),
    "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion": (
        "stable unCLIP",
        "scripts/unclip.py",
    ),
    "ldm.modules.midas.api.MiDaSInference": ("depth", "scripts/depth2img.py"),
    "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation": (
        "x4 upscaling",
        "scripts/upscale.py",
    ),
    "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation": (
        "stable unCLIP",
        "scripts/unclip.py",
    ),
    "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder": (
        "stable unCLIP",
        "scripts/unclip.py",
    ),
    "ldm.modules.encoders.modules.ClipImageEmbedder": ("stable unCLIP", "scripts/unclip.py"),
    "ldm.models.autoencoder.VQModel": ("VQ first stage", ""),
    "ldm.models.autoencoder.VQModelInterface": ("VQ first stage", ""),
    "ldm.modules.encoders.modules.BERTEmbedder": ("BERT-conditioned", ""),
    "ldm.modules.encoders.modules.ClassEmbedder": ("class-conditioned", ""),
    "ldm.modules.encoders.modules.SpatialRescaler": ("layout-conditioned", ""),
    "sgm.models.diffusion.DiffusionEngine": ("generative-models", ""),
}

# Parameters of the original model class that only training or logging looks at.
TRAINING_ONLY = frozenset(
    {
        "ckpt_path", "clip_denoised", "concat_mode", "cond_stage_forward", "first_stage_key",
        "force_null_conditioning", "ignore_keys", "l_simple_weight", "learn_logvar",
        "load_only_unet", "log_every_t", "logvar_init", "loss_type", "make_it_fit", "monitor",
        "num_timesteps_cond", "original_elbo_weight", "reset_ema", "reset_num_ema_updates",
        "scale_by_std", "scheduler_config", "ucg_training", "unet_trainable",
        "use_positional_encodings",
    }
)  # fmt: skip
# Parameters that say in other words what the parts say, or that `load` looks at itself.
REDUNDANT = frozenset({"channels", "conditioning_key", "cond_stage_key", "use_ema"})
SCHEDULE_KEYS = ("timesteps", "linear_start", "linear_end", "cosine_s")
LIFTED_KEYS = frozenset(
    {
        "unet_config", "first_stage_config", "cond_stage_config", "cond_stage_trainable",
        "beta_schedule", "given_betas", "v_posterior", "parameterization", "scale_factor",
        "image_size", *SCHEDULE_KEYS,
    }
)  # fmt: skip

# Old prefix, new prefix. Renaming back takes the first pair that fits.
KEYS = (
    ("model.diffusion_model.", "unet."),
    ("first_stage_model.", "autoencoder."),
    ("cond_stage_model.", "conditioner.text."),
    ("depth_model.", "conditioner.depth."),
    ("low_scale_model.", "conditioner.lowres."),
    ("embedder.", "conditioner.image.clip."),
    ("noise_augmentor.", "conditioner.image.noise."),
    ("conditioner.embedders.0.", "conditioner.text."),
)

DERIVED = re.compile(
    r"""betas | (sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?
    | posterior_(variance|log_variance_clipped|mean_coef[12]) | lvlb_weights | denoiser\.sigmas
    | logvar | scale_factor | model_ema\..* | (first_stage_model\.)?(loss|model_ema)\..*
    | .*\.embeddings\.position_ids | .*\.attn_mask | v_pred | ztsnr""",
    re.VERBOSE,
)
MARKERS = ("v_pred", "ztsnr")  # empty tensors that some tools add
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"


def translate(
    spec: Mapping[str, Any], *, where: str = "config", skipped: list[str] | None = None
) -> dict[str, Any]:
    """A config in the original's words -> the same in ours: `{"target": …, "params": {…}}`.

        spec: a whole file (with `model:`) or any part of it (with `target:`); new names pass.
        skipped: receives the places of what sampling does not need.
    Raises ValueError for an unknown parameter of a family class, or a family not supported yet.
    """
    notes: list[str] = [] if skipped is None else skipped
    if "model" in spec and "target" not in spec:
        notes.extend(key for key in spec if key != "model")
        spec, where = spec["model"], f"{where}: model"
    if not isinstance(spec, Mapping) or "target" not in spec:
        raise ValueError(f"{where}: `target` is missing")
    notes.extend(f"{where}.{key}" for key in spec if key not in ("target", "params"))
    target, params = spec["target"], spec.get("params") or {}
    if not isinstance(target, str) or not isinstance(params, Mapping):
        raise ValueError(f"{where}: `target` must be a name and `params` a mapping")
    params = dict(params)
    if target in LIFTED:
        return LIFTED[target](params, where, notes)
    if target in PENDING:
        family, script = PENDING[target]
        served = f"; `{script}` will serve it" if script else ""
        raise ValueError(f"{where}: {family} models are not supported yet (`{target}`){served}")
    return {"target": TARGETS.get(target, target), "params": params}


def _latent_diffusion(params: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """`LatentDiffusion` of SD 1 and SD 2: text by cross-attention, an optional encoder."""
    for key in params:
        if key in TRAINING_ONLY:
            notes.append(f"{where}.{key}")
        elif key not in LIFTED_KEYS | REDUNDANT:
            known = LIFTED_KEYS | REDUNDANT | TRAINING_ONLY
            raise unknown("parameter of LatentDiffusion", key, known, where)
    for key in ("unet_config", "first_stage_config", "cond_stage_config"):
        if key not in params:
            raise ValueError(f"{where}: LatentDiffusion needs `{key}`")
    if params.get("conditioning_key") not in (None, "crossattn"):
        raise ValueError(
            f"{where}: LatentDiffusion with conditioning_key `{params['conditioning_key']}` is not "
            "supported yet, only `crossattn`"
        )
    parts = {
        "unet": translate(params["unet_config"], where=f"{where}.unet_config", skipped=notes),
        "autoencoder": translate(
            params["first_stage_config"], where=f"{where}.first_stage_config", skipped=notes
        ),
        "conditioner": {"target": CONDITIONER, "params": _text(params, where, notes)},
        "schedule": _schedule(params),
        "parameterization": params.get("parameterization", "eps"),
        "scale_factor": params.get("scale_factor", 1.0),
    }
    if "image_size" in params:
        parts["image_size"] = params["image_size"]
    return {"target": MODEL, "params": parts}


LIFTED: dict[str, Callable[[dict[str, Any], str, list[str]], dict[str, Any]]] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": _latent_diffusion,
}


def _text(params: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """The text encoder, if the model has one: two magic strings of the original say no.

    `torch.nn.Identity` says that the caller brings the condition itself.
    """
    config = params["cond_stage_config"]
    if config in ("__is_unconditional__", "__is_first_stage__", {"target": "torch.nn.Identity"}):
        return {}
    spec = translate(config, where=f"{where}.cond_stage_config", skipped=notes)
    if params.get("cond_stage_trainable"):
        spec["params"].setdefault("freeze", False)
    return {"text": spec}


def _schedule(params: Mapping[str, Any]) -> dict[str, Any]:
    given = params.get("given_betas")
    if given is not None:
        betas: Any = torch.tensor(given, dtype=torch.float64, device="cpu")
    else:
        numbers = {key: params[key] for key in SCHEDULE_KEYS if key in params}
        numbers["name"] = params.get("beta_schedule", "linear")
        betas = {"target": BETAS, "params": numbers}
    v_posterior = params.get("v_posterior", 0.0)
    return {"target": SCHEDULE, "params": {"betas": betas, "v_posterior": v_posterior}}


def known_targets() -> list[str]:
    """Every name that may stand after `target:`."""
    return [*TARGETS, *LIFTED, *PENDING, *OURS]


def unknown(kind: str, name: Any, known: Iterable[str], where: str) -> ValueError:
    """The error for a name outside a table, with the nearest one inside it."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    hint = f", did you mean `{near[0]}`" if near else ""
    return ValueError(f"{where}: unknown {kind} `{name}`{hint}")


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the original's names -> under ours; what is recomputed here is left out.

    Also accepts text towers saved without `text_model.`, as some tools and new libraries write.
    """
    renamed = {}
    for name, value in state.items():
        if DERIVED.fullmatch(name):
            continue
        for old, new in KEYS:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        head, tower, tail = name.partition("conditioner.text.transformer.")
        if tower and not head and not tail.startswith("text_model."):
            name = f"{tower}text_model.{tail}"
        renamed[name] = value
    return renamed


def tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers beside the weights: schedule tables, and the scale if training measured it."""
    pattern = re.compile(r"scale_factor|betas|.*alphas_cumprod.*|posterior_.*")
    return {name: value for name, value in state.items() if pattern.fullmatch(name)}


def old_name(name: str) -> str:
    """Our name of a weight, or the start of one -> the original's."""
    for old, new in KEYS:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def rename_back(
    state: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Our names -> the original's, with what its files hold beside weights.

    buffers: the schedule's tables (`Schedule.buffers()`), put first.
    """
    renamed = dict(buffers or {})
    for name, value in state.items():
        old = old_name(name)
        if old == POSITIONS:
            ids = torch.arange(len(value), device="cpu")[None]
            renamed[old.replace("embedding.weight", "ids")] = ids
        renamed[old] = value
    return renamed
