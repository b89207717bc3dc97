"""Every old name, in one place: dotted targets, the classes of the original, prefixes of weights.

    TARGETS   old dotted name -> ours                      a class that takes the YAML's keywords
    LIFTED    old family class -> function                 its parameters -> LatentDiffusion + parts
    PENDING   old name -> what serves it                   known, but not built by this version
    KEYS      old prefix <-> new prefix                    weights, used in both directions
    DERIVED   tensors recomputed here                      dropped on load, written on export

Tables, and functions with nothing clever in them. Inside the networks the original parameter names
are ours too, so nothing below those prefixes is renamed.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.runtime.errors import unknown_name

__all__ = ["rename_weights", "restore_names", "translate_config"]

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
OPEN_CLIP_IMAGE = "ldm.encoders.image.OpenCLIPImage"
CLIP_IMAGE = "ldm.encoders.image.CLIPImage"
IMAGE_EMBEDDING = "ldm.encoders.image.ImageEmbedding"
EMBEDDING_NOISE = "ldm.encoders.image.EmbeddingNoise"
DEPTH = "ldm.encoders.depth.MiDaSDepth"
LOW_RES = "ldm.encoders.lowres.LowRes"
NOISE_LEVEL = "ldm.encoders.lowres.NoiseLevel"
MASKED_IMAGE = "ldm.encoders.lowres.MaskedImage"
PATCHES = "ldm.encoders.lowres.PatchesToChannels"
ADVERSARIAL = "ldm.train.tasks.autoencoder.LossConfig"

TARGETS = {
    "ldm.models.autoencoder.AutoencoderKL": AUTOENCODER,
    "ldm.models.autoencoder.IdentityFirstStage": PIXELS,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": OPEN_CLIP,
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": CLIP,
    "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder": OPEN_CLIP_IMAGE,
    "ldm.modules.encoders.modules.ClipImageEmbedder": CLIP_IMAGE,
    "ldm.modules.encoders.modules.FrozenCLIPImageEmbedder": CLIP_IMAGE,
    "ldm.modules.encoders.modules.FrozenClipImageEmbedder": CLIP_IMAGE,
    "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation": EMBEDDING_NOISE,
    "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation": LOW_RES,
    "ldm.modules.midas.api.MiDaSInference": DEPTH,
    "ldm.modules.losses.LPIPSWithDiscriminator": ADVERSARIAL,
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": ADVERSARIAL,
    "ldm.modules.losses.contperceptual.DummyLoss": "torch.nn.Identity",
    "sgm.models.autoencoder.AutoencoderKL": AUTOENCODER,
    "sgm.modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder": OPEN_CLIP,
    "sgm.modules.encoders.modules.FrozenCLIPEmbedder": CLIP,
    "torch.nn.Identity": "torch.nn.Identity",
    "ldm.encoders.lowres.Folded": PATCHES,  # our name before 0.2
}
OURS = frozenset(
    {
        *(MODEL, CONDITIONER, SCHEDULE, BETAS, IMAGE_EMBEDDING, NOISE_LEVEL, MASKED_IMAGE, PATCHES),
        *TARGETS.values(),
    }
)
# Encoders that take the place of text, with what makes them fit its slot in published files.
IN_PLACE_OF_TEXT = {CLIP_IMAGE: {"text_tower": False}}

# Known classes that this version does not build, and what they are.
PENDING = {
    "ldm.models.autoencoder.VQModel": "VQ first stage",
    "ldm.models.autoencoder.VQModelInterface": "VQ first stage",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "VQ first stage",
    "ldm.modules.encoders.modules.BERTEmbedder": "BERT-conditioned",
    "ldm.modules.encoders.modules.ClassEmbedder": "class-conditioned",
    "ldm.modules.encoders.modules.SpatialRescaler": "layout-conditioned",
    "sgm.models.diffusion.DiffusionEngine": "generative-models",
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
FIRST_WEIGHT = "model.diffusion_model.input_blocks.0.0.weight"  # what a fine-tune may widen
FINETUNE = ("finetune_keys", "concat_keys", "c_concat_log_start", "c_concat_log_end")
SCHEDULE_KEYS = ("timesteps", "linear_start", "linear_end", "cosine_s")
LIFTED_KEYS = frozenset(
    {
        "unet_config", "first_stage_config", "cond_stage_config", "cond_stage_trainable",
        "beta_schedule", "given_betas", "v_posterior", "parameterization", "scale_factor",
        "image_size", "rescale_betas_zero_snr", *SCHEDULE_KEYS,
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
    | logvar | scale_factor | noise_augmentor\.data_(mean|std) | cond_stage_model\.(mean|std)
    | model_ema\..* | (first_stage_model\.)?(loss|model_ema)\..*
    | .*\.embeddings\.position_ids | .*\.attn_mask | v_pred | ztsnr""",
    re.VERBOSE,
)
MARKERS = ("v_pred", "ztsnr")  # empty tensors that some tools add
BLIND = "cond_stage_model.model.transformer."
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"


def translate_config(
    spec: Mapping[str, Any], *, where: str = "config", skipped: list[str] | None = None
) -> dict[str, Any]:
    """A config in the original's words -> in ours: `{"target": …, "params": {…}, "where": …}`.

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
    where = spec.get("where", where)
    notes.extend(f"{where}.{key}" for key in spec if key not in ("target", "params", "where"))
    target, params = spec["target"], spec.get("params") or {}
    if not isinstance(target, str) or not isinstance(params, Mapping):
        raise ValueError(f"{where}: `target` must be a name and `params` a mapping")
    params = dict(params)
    if target in LIFTED:
        return LIFTED[target](params, where, notes)
    if target in PENDING:
        raise ValueError(f"{where}: {PENDING[target]} models are not supported yet (`{target}`)")
    return {"target": TARGETS.get(target, target), "params": params, "where": where}


def _latent_diffusion(
    params: dict[str, Any],
    where: str,
    notes: list[str],
    *,
    name: str = "LatentDiffusion",
    conditioning: str = "crossattn",
    needs: tuple[str, ...] = (),
    takes: tuple[str, ...] = (),
    skips: tuple[str, ...] = (),
) -> dict[str, Any]:
    """`LatentDiffusion` of SD 1 and SD 2: text by cross-attention, an optional encoder.

    Families add parameters: `needs` are configs of parts, `takes` optional ones, `skips` for
    training only. conditioning: the one `conditioning_key` that works.
    """
    takes = (*takes, *needs)
    for key in params:
        if key in TRAINING_ONLY or key in skips:
            notes.append(f"{where}.{key}")
        elif key not in LIFTED_KEYS | REDUNDANT and key not in takes:
            known = LIFTED_KEYS | REDUNDANT | TRAINING_ONLY | {*takes, *skips}
            raise unknown_name(f"parameter of {name}", key, known, where)
    for key in ("unet_config", "first_stage_config", "cond_stage_config", *needs):
        if key not in params:
            raise ValueError(f"{where}: {name} needs `{key}`")
    if params.get("conditioning_key") not in (None, conditioning):
        raise ValueError(
            f"{where}: {name} with conditioning_key `{params['conditioning_key']}` is not "
            f"supported yet, only `{conditioning}`"
        )
    parts = {
        "unet": _part(params, "unet_config", where, notes),
        "autoencoder": _part(params, "first_stage_config", where, notes),
        "conditioner": {"target": CONDITIONER, "params": _text(params, where, notes)},
        "schedule": _schedule(params),
        "parameterization": params.get("parameterization", "eps"),
        "scale_factor": params.get("scale_factor", 1.0),
    }
    if "image_size" in params:
        parts["image_size"] = params["image_size"]
    return {"target": MODEL, "params": parts, "where": where}


def _inpainting(params: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    spec = _latent_diffusion(
        params,
        where,
        notes,
        name="LatentInpaintDiffusion",
        conditioning="hybrid",
        skips=(*FINETUNE, "masked_image_key"),
    )
    return _listening(spec, masked={"target": MASKED_IMAGE, "params": {}})


def _depth(params: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    spec = _latent_diffusion(
        params,
        where,
        notes,
        name="LatentDepth2ImageDiffusion",
        conditioning="hybrid",
        needs=("depth_stage_config",),
        skips=FINETUNE,
    )
    return _listening(spec, depth=_part(params, "depth_stage_config", where, notes))


def _upscaling(params: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    spec = _latent_diffusion(
        params,
        where,
        notes,
        name="LatentUpscaleDiffusion",
        conditioning="hybrid-adm",
        needs=("low_scale_config",),
        takes=("low_scale_key",),
        skips=("noise_level_key",),
    )
    lowres = _part(params, "low_scale_config", where, notes)
    lowres["params"]["low_scale_key"] = params.get("low_scale_key", "LR")
    return _listening(spec, lowres=lowres, level={"target": NOISE_LEVEL, "params": {}})


def _enlarging(params: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    name, takes = "LatentUpscaleFinetuneDiffusion", ("concat_keys", "reshuffle_patch_size")
    skips = tuple(key for key in FINETUNE if key not in takes)
    how: dict[str, Any] = {"name": name, "conditioning": "hybrid", "takes": takes, "skips": skips}
    spec = _latent_diffusion(params, where, notes, **how)
    (key,) = params.get("concat_keys") or ["lr"]
    folded = {"key": key, "patch": params.get("reshuffle_patch_size") or 1}
    return _listening(spec, folded={"target": PATCHES, "params": folded})


def _unclip(params: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    spec = _latent_diffusion(
        params,
        where,
        notes,
        name="ImageEmbeddingConditionedLatentDiffusion",
        conditioning="crossattn-adm",
        needs=("embedder_config", "noise_aug_config"),
        takes=("freeze_embedder", "embedding_key"),
        skips=("embedding_dropout",),
    )
    image = {
        "clip": _part(params, "embedder_config", where, notes),
        "noise": _part(params, "noise_aug_config", where, notes),
        "freeze": params.get("freeze_embedder", True),
        "embedding_key": params.get("embedding_key", "jpg"),
    }
    return _listening(spec, image={"target": IMAGE_EMBEDDING, "params": image})


DDPM = "ldm.models.diffusion.ddpm."
LIFTED: dict[str, Callable[[dict[str, Any], str, list[str]], dict[str, Any]]] = {
    DDPM + "LatentDiffusion": _latent_diffusion,
    DDPM + "LatentInpaintDiffusion": _inpainting,
    DDPM + "LatentDepth2ImageDiffusion": _depth,
    DDPM + "LatentUpscaleDiffusion": _upscaling,
    DDPM + "LatentUpscaleFinetuneDiffusion": _enlarging,
    DDPM + "ImageEmbeddingConditionedLatentDiffusion": _unclip,
}


def _listening(spec: dict[str, Any], **encoders: dict[str, Any]) -> dict[str, Any]:
    """The model with more encoders, behind that of text."""
    spec["params"]["conditioner"]["params"] |= encoders
    return spec


def _part(params: Mapping[str, Any], key: str, where: str, notes: list[str]) -> dict[str, Any]:
    return translate_config(params[key], where=f"{where}.params.{key}", skipped=notes)


def _text(params: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """The text encoder (or what stands in its place), if the model has one.

    Two magic strings of the original say that it has none;
    `torch.nn.Identity` says that the caller brings the condition itself.
    """
    config = params["cond_stage_config"]
    if config in ("__is_unconditional__", "__is_first_stage__", {"target": "torch.nn.Identity"}):
        return {}
    spec = translate_config(config, where=f"{where}.params.cond_stage_config", skipped=notes)
    spec["params"] |= IN_PLACE_OF_TEXT.get(spec["target"], {})
    if params.get("cond_stage_trainable"):
        spec["params"].setdefault("freeze", False)
    return {"text": spec}


def _schedule(params: Mapping[str, Any]) -> dict[str, Any]:
    given = params.get("given_betas")
    if given is not None:
        betas: Any = torch.tensor(given, dtype=torch.float64, device="cpu")
    else:
        named = {key: params[key] for key in SCHEDULE_KEYS if key in params}
        named["name"] = params.get("beta_schedule", "linear")
        betas = {"target": BETAS, "params": named}
    numbers = {"betas": betas, "v_posterior": params.get("v_posterior", 0.0)}
    numbers["zero_snr"] = params.get("rescale_betas_zero_snr", False)
    return {"target": SCHEDULE, "params": numbers}


def known_targets() -> list[str]:
    """Every name that may stand after `target:`."""
    return [*TARGETS, *LIFTED, *PENDING, *OURS]


def rename_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the original's names -> under ours; what is recomputed here is left out.

    Also accepts text towers saved without `text_model.`, as some tools and new libraries write.
    """
    renamed = {}
    sees = "cond_stage_model.model.visual.proj" in state  # CLIP, of which only the eye is used
    for name, value in state.items():
        if DERIVED.fullmatch(name) or (sees and name.startswith(BLIND)):
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


def loss_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of training losses in an original file: `discriminator.…`, `perceptual_loss.…`."""
    matches = {re.fullmatch(r"(first_stage_model\.)?loss\.(.+)", name): name for name in state}
    return {match[2]: state[name] for match, name in matches.items() if match}


def schedule_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers beside the weights: schedule tables, and the scale if training measured it."""
    pattern = re.compile(
        r"scale_factor|betas|\w*alphas_cumprod\w*|posterior_.*|noise_augmentor\.data_(mean|std)"
    )
    return {name: value for name, value in state.items() if pattern.fullmatch(name)}


def original_name(name: str) -> str:
    """Our name of a weight, or the start of one -> the original's."""
    for old, new in KEYS:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def restore_names(
    state: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Our names -> the original's, with what its files hold beside weights.

    buffers: the schedule's tables (`Schedule.buffers()`), put first.
    """
    renamed = dict(buffers or {})
    for name, value in state.items():
        old = original_name(name)
        if old == POSITIONS:
            ids = torch.arange(len(value), device="cpu")[None]
            renamed[old.replace("embedding.weight", "ids")] = ids
        renamed[old] = value
    return renamed
