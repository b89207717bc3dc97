"""Translate configs of the original code: its class names and their parameters.

    TARGETS               original class -> our class with the same parameters
    MODEL_CLASSES         original model class -> how to translate it; sgm's is in `sgm`
    UNSUPPORTED_CLASSES   original class that is known, but not supported -> its purpose

Names of weights are in `weight_names`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ldm.loading.sgm import DIFFUSION_ENGINE, check_params, translate_engine
from ldm.runtime.errors import ConfigError, errors_as
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "AUTOENCODER_CONFIG", "CONFIG_ALIASES", "LATENT_DIFFUSION", "MODEL_CLASSES", "OUR_CLASSES",
    "list_targets", "translate_config",
]  # fmt: skip

LATENT_DIFFUSION = "ldm.model.LatentDiffusion"
AUTOENCODER = "ldm.nets.autoencoder.AutoencoderKL"
BERT_TEXT, CLASS_EMBEDDER = "ldm.encoders.bert.BERTText", "ldm.encoders.labels.ClassEmbedder"
CLIP_IMAGE, IDENTITY_ENCODER = "ldm.encoders.image.CLIPImage", "ldm.encoders.labels.IdentityEncoder"
IDENTITY = "torch.nn.Identity"
IMAGE_MODULE, CONCAT_MODULE = "ldm.encoders.image.", "ldm.encoders.concat_images."
SPATIAL_RESCALER = CONCAT_MODULE + "SpatialRescaler"
SCHEDULE = "ldm.diffusion.schedule."
LDM_DDPM, LDM_UPSCALING = "ldm.models.diffusion.ddpm.", "ldm.modules.diffusionmodules.upscaling."
LDM_ENCODERS, LDM_LOSSES = "ldm.modules.encoders.modules.", "ldm.modules.losses."
OPENAI_UNET = "modules.diffusionmodules.openaimodel.UNetModel"
SGM_ENCODERS = "sgm.modules.encoders.modules."

# Our class -> its names in the original and in taming-transformers, and our former names.
OUR_CLASSES = {
    LATENT_DIFFUSION: (),
    "ldm.model.Defaults": (),
    "ldm.conditioning.Conditioner": (),
    SCHEDULE + "Schedule": (),
    SCHEDULE + "ContinuousSchedule": (),
    SCHEDULE + "make_betas": (),
    AUTOENCODER: (
        "ldm.models.autoencoder.AutoencoderKL", "sgm.models.autoencoder.AutoencoderKL",
        "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
    ),
    "ldm.nets.autoencoder.AutoencoderVQ": (
        "ldm.models.autoencoder.VQModelInterface", "ldm.models.autoencoder.VQModel",
        "taming.models.vqgan.VQModel",
    ),
    "ldm.nets.autoencoder.PixelSpace": (
        "ldm.models.autoencoder.IdentityFirstStage", "sgm.models.autoencoder.IdentityFirstStage",
    ),
    "ldm.nets.latent_upscaler.LatentUpscalerUNet": (),
    "ldm.nets.unet.UNet": ("ldm." + OPENAI_UNET, "sgm." + OPENAI_UNET),
    "ldm.encoders.text.OpenCLIPText": (
        LDM_ENCODERS + "FrozenOpenCLIPEmbedder", SGM_ENCODERS + "FrozenOpenCLIPEmbedder",
        SGM_ENCODERS + "FrozenOpenCLIPEmbedder2",
    ),
    "ldm.encoders.text.CLIPText": (
        LDM_ENCODERS + "FrozenCLIPEmbedder", SGM_ENCODERS + "FrozenCLIPEmbedder",
    ),
    "ldm.encoders.sizes.SizeEmbedding": (
        SGM_ENCODERS + "ConcatTimestepEmbedderND",
        SGM_ENCODERS + "ConcatTimestepEmbedderAND",  # sic, in a YAML of A1111
    ),
    CLASS_EMBEDDER: (SGM_ENCODERS + "ClassEmbedder", LDM_ENCODERS + "ClassEmbedder"),
    BERT_TEXT: (LDM_ENCODERS + "BERTEmbedder", LDM_ENCODERS + "TransformerEmbedder"),
    IDENTITY_ENCODER: (SGM_ENCODERS + "IdentityEncoder",),
    IMAGE_MODULE + "OpenCLIPImage": (LDM_ENCODERS + "FrozenOpenCLIPImageEmbedder",),
    CLIP_IMAGE: (
        LDM_ENCODERS + "ClipImageEmbedder", LDM_ENCODERS + "FrozenCLIPImageEmbedder",
        LDM_ENCODERS + "FrozenClipImageEmbedder",
    ),
    IMAGE_MODULE + "ImageEmbedding": (),
    IMAGE_MODULE + "EmbeddingNoise": (LDM_ENCODERS + "CLIPEmbeddingNoiseAugmentation",),
    "ldm.encoders.depth.MiDaSDepth": ("ldm.modules.midas.api.MiDaSInference",),
    CONCAT_MODULE + "LowResImage": (
        LDM_UPSCALING + "ImageConcatWithNoiseAugmentation",
        "ldm.encoders.lowres.LowRes",  # our name before 0.2
    ),
    CONCAT_MODULE + "NoiseLevel": (),
    CONCAT_MODULE + "RGBDLatent": (),
    CONCAT_MODULE + "LowResLatent": (),
    CONCAT_MODULE + "NoiseSigma": (),
    CONCAT_MODULE + "MaskedImage": (),
    CONCAT_MODULE + "BlackMaskedImage": (),
    SPATIAL_RESCALER: (LDM_ENCODERS + "SpatialRescaler",),
    CONCAT_MODULE + "PatchesToChannels": ("ldm.encoders.lowres.Folded",),  # our name before 0.2
    "ldm.train.tasks.autoencoder.AdversarialLossConfig": (
        LDM_LOSSES + "LPIPSWithDiscriminator", LDM_LOSSES + "contperceptual.LPIPSWithDiscriminator",
        "ldm.train.tasks.autoencoder.LossConfig",  # our name before 0.2
    ),
    "ldm.train.tasks.autoencoder.VQLossConfig": (
        "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        LDM_LOSSES + "vqperceptual.VQLPIPSWithDiscriminator",
    ),
    IDENTITY: (LDM_LOSSES + "contperceptual.DummyLoss", IDENTITY),
}  # fmt: skip
TARGETS = {original: ours for ours, originals in OUR_CLASSES.items() for original in originals}
TARGETS |= {  # our name of the module before 0.2
    name.replace(CONCAT_MODULE, "ldm.encoders.lowres."): name
    for name in OUR_CLASSES
    if name.startswith(CONCAT_MODULE) and name != CONCAT_MODULE + "LowResImage"
}
# Former parameters of our classes, in configs that were written before 0.2.
RENAMED_PARAMS = {
    "ldm.diffusion.schedule.Schedule": {
        "log_time": "uses_log_sigma",
        "quantize_time": "quantize_c_noise",
        "flip_time": "flip_timesteps",
    },
    "ldm.diffusion.schedule.ContinuousSchedule": {"log_time": "uses_log_sigma"},
    CONCAT_MODULE + "PatchesToChannels": {"patch": "patches_per_side"},
}
# Defaults that differ from those of our class: of an original class, and in `cond_stage_config`.
CLASS_DEFAULTS = {
    LDM_ENCODERS + "FrozenCLIPImageEmbedder": {"antialias": False},
    LDM_ENCODERS + "FrozenClipImageEmbedder": {"antialias": False},
}
COND_STAGE_DEFAULTS = {CLIP_IMAGE: {"text_tower": False}}

# Original config -> the config to read instead. They differ only in dtype, which `load` sets.
CONFIG_ALIASES = {
    f"configs/stable-diffusion/intel/{name}-{dtype}.yaml": f"configs/stable-diffusion/{name}.yaml"
    for name in ("v2-inference", "v2-inference-v")
    for dtype in ("fp32", "bf16")
}

# Known, but unsupported class -> its purpose, for messages.
UNSUPPORTED_CLASSES = {
    "sgm.models.autoencoder.AutoencodingEngine": "autoencoders of separate encoder and decoder",
    "taming.models.vqgan.GumbelVQ": "VQ autoencoders of Gumbel-softmax",
    "taming.models.vqgan.EMAVQ": "VQ autoencoders with an EMA codebook",
    LDM_ENCODERS + "FrozenCLIPTextEmbedder": "encoders of CLIP text embeddings",
    LDM_DDPM + "Layout2ImgDiffusion": "layout models that log plots of boxes",
    "ldm.models.diffusion.ddpm_edit.LatentDiffusion": "InstructPix2Pix models",
    "cldm.cldm.ControlLDM": "ControlNets",
    "ldm.models.diffusion.classifier.NoisyLatentImageClassifier": "classifiers of noisy latents",
    LDM_ENCODERS + "FrozenT5Embedder": "text encoders of T5",
    LDM_ENCODERS + "FrozenCLIPT5Encoder": "text encoders of T5",
    SGM_ENCODERS + "FrozenT5Embedder": "text encoders of T5",
    SGM_ENCODERS + "FrozenByT5Embedder": "text encoders of T5",
}

# Encoders of latent-diffusion, which train with the UNet if `cond_stage_trainable` is set.
TRAINABLE_ENCODERS = (BERT_TEXT, CLASS_EMBEDDER, SPATIAL_RESCALER)
UNCONDITIONAL, FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"  # `cond_stage_config`
# Batch keys of class labels, low-res images, and a context that the caller passes.
CLASS_KEY, LOW_RES_KEY, CONTEXT_KEY = "class_label", "lr", "context"
ORIGINAL_LOW_RES_KEY = "LR_image"
# Classes of ImageNet, and one more: the unconditional class, which is the last.
NUM_CLASSES_WITH_UNCONDITIONAL = 1001
# Default sampling options by encoder, from the scripts of the original and of its forks.
UNGUIDED_DEFAULTS = {"scale": 1.0}
STOCHASTIC_DEFAULTS = {"scale": 1.0, "eta": 1.0}  # also of unconditional models
SAMPLING_DEFAULTS: Mapping[str, JsonObject] = {
    BERT_TEXT: {"scale": 5.0, "steps": 200},
    CLASS_EMBEDDER: {"scale": 3.0, "steps": 20},  # with an unconditional class
    CONCAT_MODULE + "BlackMaskedImage": UNGUIDED_DEFAULTS,
    CONCAT_MODULE + "PatchesToChannels": STOCHASTIC_DEFAULTS,
    SPATIAL_RESCALER: STOCHASTIC_DEFAULTS,
    CLIP_IMAGE: {"scale": 3.0},
    IDENTITY_ENCODER: {"scale": 5.0},
}
UNCLIP_DEFAULTS = {"steps": 20}  # of the original's page
# The same for LDM3D and LDM3D-SR, from their pipelines in diffusers.
LDM3D_DEFAULTS = {"scale": 5.0, "steps": 49}
LDM3D_SR_DEFAULTS = {"scale": 9.0, "steps": 75}
# Parameters of the original's model classes that only training or logging uses.
TRAINING_ONLY_PARAMS = {
    "ckpt_path", "clip_denoised", "cond_stage_forward", "first_stage_key",
    "force_null_conditioning", "ignore_keys", "l_simple_weight", "learn_logvar", "load_only_unet",
    "log_every_t", "logvar_init", "loss_type", "make_it_fit", "monitor", "num_timesteps_cond",
    "original_elbo_weight", "reset_ema", "reset_num_ema_updates", "scale_by_std",
    "scheduler_config", "ucg_training", "unet_trainable", "use_positional_encodings",
}  # fmt: skip
# Parameters that repeat values of the components, or that `load` reads itself.
REDUNDANT_PARAMS = {"channels", "conditioning_key", "cond_stage_key", "use_ema"}
# The weight that may have fewer input channels in the `ckpt_path` of a training run.
INPUT_CONV = "model.diffusion_model.input_blocks.0.0.weight"
FINETUNE_PARAMS = (
    "finetune_keys", "keep_finetune_dims", "concat_keys", "c_concat_log_start", "c_concat_log_end",
)  # fmt: skip
AUTOENCODER_CONFIG = "first_stage_config"
SCHEDULE_KEYS = ("timesteps", "linear_start", "linear_end", "cosine_s")
MODEL_PARAMS = {
    "unet_config", "first_stage_config", "cond_stage_config", "cond_stage_trainable", "concat_mode",
    "beta_schedule", "given_betas", "v_posterior", "parameterization", "scale_factor",
    "image_size", "rescale_betas_zero_snr", *SCHEDULE_KEYS,
    "defaults",  # ours: of `ldm.model.Defaults`
}  # fmt: skip


def translate_config(
    spec: JsonMapping, *, where: str = "config", skipped: list[str] | None = None
) -> JsonObject:
    """Translate a config of the original to `{"target": …, "params": {…}, "where": …}` of ours.

    `where` in the result is the file and key from which it was read, for messages.

    Args:
        spec: A whole config (with `model:`), or that of a component (with `target:`).
        where: See `instantiate`.
        skipped: List to which keys that sampling does not need are appended; None = no list.
    """
    skipped = [] if skipped is None else skipped
    if isinstance(spec, Mapping) and "model" in spec and "target" not in spec:
        skipped.extend(key for key in spec if key != "model")
        spec, where = spec["model"], f"{where}: model"
    if not isinstance(spec, Mapping) or "target" not in spec:
        raise ConfigError(f"{where}: `target` is missing")
    where = spec.get("where", where)
    skipped.extend(f"{where}.{key}" for key in spec if key not in ("target", "params", "where"))
    target, params = spec["target"], spec.get("params") or {}
    if not isinstance(target, str) or not isinstance(params, Mapping):
        raise ConfigError(f"{where}: `target` must be a name and `params` a mapping")
    if target in UNSUPPORTED_CLASSES:
        raise ConfigError(
            f"{where}: {UNSUPPORTED_CLASSES[target]} are not supported yet (`{target}`)"
        )
    with errors_as(ConfigError, f"{where}: invalid parameters"):
        if target in MODEL_CLASSES:
            return _ModelTranslator(target, params, where, skipped).translate()
        if target == DIFFUSION_ENGINE:
            translate = partial(translate_config, skipped=skipped)
            model_params = translate_engine(params, f"{where}.params", skipped, translate)
            return {"target": LATENT_DIFFUSION, "params": model_params, "where": where}
    defaults = CLASS_DEFAULTS.get(target, {})
    target = TARGETS.get(target, target)
    names = RENAMED_PARAMS.get(target, {})
    params = defaults | {names.get(name, name): value for name, value in params.items()}
    return {"target": target, "params": params, "where": where}


Encoders = dict[str, JsonObject]  # specs of encoders by name in the conditioner


@dataclass
class _ModelTranslator:
    """Translates the parameters of an original model class into those of LatentDiffusion."""

    target: str
    params: JsonMapping
    where: str
    skipped: list[str]

    def translate(self) -> JsonObject:
        self._check_params()
        params = self.params
        cond_stage = self._translate_cond_stage()
        encoders = cond_stage | MODEL_CLASSES[self.target].make_encoders(self)
        model_params = {
            "unet": self.translate_component("unet_config"),
            "autoencoder": self.translate_component(AUTOENCODER_CONFIG),
            "conditioner": {"target": "ldm.conditioning.Conditioner", "params": encoders},
            "schedule": {"target": SCHEDULE + "Schedule", "params": self._translate_schedule()},
            "parameterization": params.get("parameterization", "eps"),
            "scale_factor": params.get("scale_factor", 1.0),
        }
        if "image_size" in params:
            model_params["image_size"] = params["image_size"]
        ddconfig = model_params["autoencoder"]["params"].get("ddconfig") or {}
        defaults = dict(params.get("defaults") or {})
        if ddconfig.get("in_channels", 3) in (4, 6):  # color and depth
            defaults = (LDM3D_SR_DEFAULTS if "rgbd" in encoders else LDM3D_DEFAULTS) | defaults
        defaults = self._find_defaults(cond_stage) | defaults
        if encoders.get("image", {}).get("target") == IMAGE_MODULE + "ImageEmbedding":
            defaults = UNCLIP_DEFAULTS | defaults
        if defaults:
            model_params["defaults"] = {"target": "ldm.model.Defaults", "params": defaults}
        return {"target": LATENT_DIFFUSION, "params": model_params, "where": self.where}

    def translate_component(self, key: str) -> JsonObject:
        """Return the translated config of a component."""
        where = f"{self.where}.params.{key}"
        return translate_config(self.params[key], where=where, skipped=self.skipped)

    def _check_params(self) -> None:
        name, cls = self.target.rpartition(".")[2], MODEL_CLASSES[self.target]
        required = ("unet_config", AUTOENCODER_CONFIG, "cond_stage_config", *cls.required)
        used = {*MODEL_PARAMS, *REDUNDANT_PARAMS, *cls.required, *cls.optional}
        training_only = {*TRAINING_ONLY_PARAMS, *cls.training_only}
        self.skipped += check_params(name, self.params, required, used, training_only, self.where)
        conditioning = self.params.get("conditioning_key")
        if conditioning not in (None, *cls.conditioning_keys):
            allowed = " or ".join(f"`{key}`" for key in cls.conditioning_keys)
            raise ConfigError(
                f"{self.where}: {name} with conditioning_key `{conditioning}` is not supported "
                f"yet, only {allowed}"
            )

    def _check_slot(self, target: str) -> None:
        """Raise ConfigError if the output of an encoder does not fit the `conditioning_key`."""
        conditioning = self.params.get("conditioning_key")
        slot = "concat" if target == SPATIAL_RESCALER else "crossattn"
        if conditioning in ("concat", "crossattn") and conditioning != slot:
            raise ConfigError(
                f"{self.where}: conditioning_key `{conditioning}` does not fit "
                f"{target.rpartition('.')[2]}, only `{slot}`"
            )

    def _translate_cond_stage(self) -> Encoders:
        """Return {"text": the encoder of a prompt, or of what replaces it}, or other encoders.

        There are none in unconditional models, and in those whose caller passes the context itself.
        """
        config = self.params["cond_stage_config"]
        target, key = config, self.params.get("cond_stage_key", "image")
        if config not in (UNCONDITIONAL, FIRST_STAGE):
            spec = self.translate_component("cond_stage_config")
            target = spec["target"]
        if target in (UNCONDITIONAL, FIRST_STAGE, IDENTITY):
            # The original's default, as `concat_mode` is true by default.
            default = "concat" if self.params.get("concat_mode", True) else ""
            slot = self.params.get("conditioning_key") or default
            if target == IDENTITY and slot == "crossattn":
                params = {"key": CONTEXT_KEY}
                return {"context": {"target": IDENTITY_ENCODER, "params": params}}
            if target == UNCONDITIONAL or slot != "concat":
                return {}
            if target == FIRST_STAGE:
                return {"masked": {"target": CONCAT_MODULE + "BlackMaskedImage", "params": {}}}
            key = LOW_RES_KEY if key == ORIGINAL_LOW_RES_KEY else key
            image = {"target": CONCAT_MODULE + "PatchesToChannels", "params": {"key": key}}
            return {"image": image}
        self._check_slot(target)
        is_trainable = bool(self.params.get("cond_stage_trainable"))
        params = spec["params"] = COND_STAGE_DEFAULTS.get(target, {}) | spec["params"]
        if target in TRAINABLE_ENCODERS:
            params.setdefault("is_trainable", is_trainable)
        elif is_trainable:
            params.setdefault("freeze", False)
        if target == CLASS_EMBEDDER:
            params |= {"key": CLASS_KEY, "add_sequence_dim": True}
            if params.get("n_classes") == NUM_CLASSES_WITH_UNCONDITIONAL:
                params.setdefault("null", NUM_CLASSES_WITH_UNCONDITIONAL - 1)
        elif target == SPATIAL_RESCALER or not params.get("use_tokenizer", True):
            params["key"] = key
        return {"text": spec}

    def _find_defaults(self, cond_stage: Encoders) -> JsonObject:
        """Return the default sampling options of a model with these encoders in `cond_stage`."""
        if self.params["cond_stage_config"] == UNCONDITIONAL:
            return STOCHASTIC_DEFAULTS
        for encoder in cond_stage.values():  # there is at most one
            target, params = encoder["target"], encoder["params"]
            if target == CLASS_EMBEDDER and params.get("null") is None:
                return UNGUIDED_DEFAULTS
            if target == BERT_TEXT and not params.get("use_tokenizer", True):
                return UNGUIDED_DEFAULTS
            return SAMPLING_DEFAULTS.get(target, {})
        return {}

    def _translate_schedule(self) -> JsonObject:
        betas: Any = self.params.get("given_betas")
        if betas is not None:
            betas = torch.tensor(betas, dtype=torch.float64, device="cpu")
        else:
            options = {key: self.params[key] for key in SCHEDULE_KEYS if key in self.params}
            options["name"] = self.params.get("beta_schedule", "linear")
            betas = {"target": SCHEDULE + "make_betas", "params": options}
        zero_snr = self.params.get("rescale_betas_zero_snr", False)
        posterior = self.params.get("v_posterior", 0.0)
        return {"betas": betas, "v_posterior": posterior, "zero_snr": zero_snr}


NOISE_LEVEL: Encoders = {"level": {"target": CONCAT_MODULE + "NoiseLevel", "params": {}}}


@dataclass(frozen=True)
class _ModelClass:
    """A model class of the original.

    Args:
        conditioning_keys: Its supported values of `conditioning_key`.
        make_encoders: Returns the specs of its encoders besides the text encoder.
        required: Required parameters: configs of components.
    """

    conditioning_keys: tuple[str, ...]
    make_encoders: Callable[[_ModelTranslator], Encoders] = lambda translator: {}
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    training_only: tuple[str, ...] = ()


def _make_masked_image(translator: _ModelTranslator) -> Encoders:
    return {"masked": {"target": CONCAT_MODULE + "MaskedImage", "params": {}}}


def _make_depth(translator: _ModelTranslator) -> Encoders:
    return {"depth": translator.translate_component("depth_stage_config")}


def _make_low_res(translator: _ModelTranslator) -> Encoders:
    low_res = translator.translate_component("low_scale_config")
    if low_res["target"] == CONCAT_MODULE + "RGBDLatent":  # of a diffusers folder
        unet_params = translator.translate_component("unet_config")["params"]
        has_level = unet_params.get("num_classes") is not None
        return {"rgbd": low_res} | (NOISE_LEVEL if has_level else {})
    low_res["params"]["low_scale_key"] = translator.params.get("low_scale_key", "LR")
    return {"lowres": low_res, **NOISE_LEVEL}


def _make_patches(translator: _ModelTranslator) -> Encoders:
    if translator.params.get("low_scale_config") is not None:
        raise ConfigError(f"{translator.where}: low_scale_config with patches is not supported yet")
    (key,) = translator.params.get("concat_keys") or ["lr"]
    # The original's name is wrong: it is not the size of the patches.
    patches_per_side = translator.params.get("reshuffle_patch_size") or 1
    params = {"key": key, "patches_per_side": patches_per_side}
    return {"folded": {"target": CONCAT_MODULE + "PatchesToChannels", "params": params}}


def _make_image_embedding(translator: _ModelTranslator) -> Encoders:
    params = {
        "clip": translator.translate_component("embedder_config"),
        "noise": translator.translate_component("noise_aug_config"),
        "freeze": translator.params.get("freeze_embedder", True),
        "embedding_key": translator.params.get("embedding_key", "jpg"),
    }
    return {"image": {"target": IMAGE_MODULE + "ImageEmbedding", "params": params}}


MODEL_CLASSES = {
    LDM_DDPM + "LatentDiffusion": _ModelClass(("crossattn", "concat")),
    LDM_DDPM + "LatentInpaintDiffusion": _ModelClass(
        ("hybrid",), _make_masked_image, training_only=(*FINETUNE_PARAMS, "masked_image_key")
    ),
    LDM_DDPM + "LatentDepth2ImageDiffusion": _ModelClass(
        ("hybrid",), _make_depth, required=("depth_stage_config",), training_only=FINETUNE_PARAMS
    ),
    LDM_DDPM + "LatentUpscaleDiffusion": _ModelClass(
        ("hybrid-adm",),
        _make_low_res,
        required=("low_scale_config",),
        optional=("low_scale_key",),
        training_only=("noise_level_key",),
    ),
    LDM_DDPM + "LatentUpscaleFinetuneDiffusion": _ModelClass(
        ("hybrid",),
        _make_patches,
        optional=("concat_keys", "reshuffle_patch_size", "low_scale_config"),
        training_only=(*FINETUNE_PARAMS, "low_scale_key"),
    ),
    LDM_DDPM + "ImageEmbeddingConditionedLatentDiffusion": _ModelClass(
        ("crossattn-adm",),
        _make_image_embedding,
        required=("embedder_config", "noise_aug_config"),
        optional=("freeze_embedder", "embedding_key"),
        training_only=("embedding_dropout",),
    ),
}


def list_targets() -> list[str]:
    """Return every known `target`, supported or not, for suggestions."""
    return [*TARGETS, *MODEL_CLASSES, DIFFUSION_ENGINE, *UNSUPPORTED_CLASSES, *OUR_CLASSES]
