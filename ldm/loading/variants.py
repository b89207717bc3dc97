"""Few-step (distilled) models: how they are recognized, and their default sampling options.

They have the shapes of their family; only a latent consistency model that embeds the guidance scale
has an additional tensor. So they are recognized by this tensor, else by metadata, file name or the
scheduler of a diffusers folder, in this order. If a text matches several, the first one applies.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ldm.model import Defaults, LatentDiffusion
from ldm.pipelines.families import is_sdxl

__all__ = [
    "ARGUMENT_EVIDENCE", "GUIDANCE_EMBED_KEY", "NO_VARIANT", "SCHEDULER_KEY", "VARIANTS",
    "DetectedVariant", "Variant", "detect_lora_variant", "detect_variant", "find_model_name",
    "is_variant_fixed", "looks_distilled", "set_variant",
]  # fmt: skip

NO_VARIANT = "base"  # the argument for an ordinary model
ARGUMENT_EVIDENCE = "the argument"  # evidence of a variant that the caller names
SCHEDULER_KEY = "ldm.scheduler"  # metadata key of the class of a diffusers folder's scheduler
GUIDANCE_EMBED_KEY = "unet.time_embed_cond.weight"


@dataclass(frozen=True)
class Variant:
    """A variant of distilled models, and of LoRAs that turn other models into them.

    Args:
        title: Name in messages.
        defaults: Default sampling options; a file name may contain another number of steps.
        model_pattern: Pattern in metadata and file names of models, in lower case; "(?!)" matches
            nothing.
        lora_pattern: The same for LoRAs; stricter, as these are often named after their subject.
        marker: Name of a tensor that only these models have; "" = no such tensor.
        prediction_type: "x0" …; None = that of the family.
        keeps_scheduler: Whether SDXL's diffusers folders keep their sampler and scheduler.
        sdxl_latent_size: Side in latent pixels at which SDXL models of this variant were trained.
    """

    title: str
    defaults: Defaults
    model_pattern: str
    lora_pattern: str
    marker: str = ""
    prediction_type: str | None = None
    keeps_scheduler: bool = False
    sdxl_latent_size: int = 128


NUM_STEPS_PATTERN = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")


def _make_word_pattern(word: str) -> str:
    """Return a pattern for a word with a word boundary before or after it."""
    return rf"(?<![a-z]){word}|{word}(?![a-z])"


# fmt: off
VARIANTS = {
    "lcm-full": Variant(
        "a latent consistency model that embeds the guidance scale",
        Defaults(8.0, 4, "lcm", "lcm", max_steps=16, max_scale=16.0),
        "(?!)", "(?!)", marker=GUIDANCE_EMBED_KEY),
    "lcm": Variant(
        "LCM",
        Defaults(1.0, 4, "lcm", "lcm", max_steps=16, max_scale=2.5),
        _make_word_pattern("lcm"), r"(?<![a-z])lcm(?![a-z])"),
    "tcd": Variant(
        "TCD",
        Defaults(1.0, 4, "tcd", "tcd", max_scale=2.5),
        r"(?<![a-z])tcd(?![a-z])", r"(?<![a-z])tcd(?![a-z])"),
    "hyper-1step": Variant(
        "Hyper-SD for one step",
        Defaults(1.0, 1, "tcd", "tcd", eta=1.0, max_steps=8, max_scale=2.5),
        r"hyper[-_ ]?(sd|sdxl|xl)?\w*[-_ ]1[-_ ]?step", r"hyper[-_ ]?(sd|xl)\w*[-_ ]1[-_ ]?step"),
    "hyper-cfg": Variant(
        "Hyper-SD with guidance",
        Defaults(6.0, 8, "ddim", "trailing", max_steps=25, max_scale=9.0),
        r"hyper[-_ ]?(sd|xl).*cfg", r"hyper[-_ ]?(sd|xl).*cfg"),
    "hyper": Variant(
        "Hyper-SD",
        Defaults(1.0, 4, "ddim", "trailing", max_steps=16, max_scale=2.5),
        r"hyper[-_ ]?(sd|xl|\d+[-_ ]?steps?)", r"hyper[-_ ]?(sd|xl|\d+[-_ ]?steps?)"),
    "lightning-x0": Variant(
        "Lightning for one step",
        Defaults(1.0, 1, "euler", "trailing", max_steps=1, max_scale=1.0),
        r"lightning.*1[-_ ]?step.*x0", "(?!)", prediction_type="x0"),
    "lightning": Variant(
        "Lightning",
        Defaults(1.0, 4, "euler", "trailing", max_steps=12, max_scale=2.5),
        _make_word_pattern("lightning"),
        r"lightning.*\d[-_ ]?steps?|lightning[-_ ]?lora|xl[-_ ]?lightning",
        keeps_scheduler=True),
    "turbo": Variant(
        "Turbo",
        Defaults(1.0, 4, "euler_a", "turbo", max_steps=10, max_scale=2.5),
        _make_word_pattern("turbo"), r"(sd|xl)[-_ ]?turbo|turbo[-_ ]?(lora|xl)",
        keeps_scheduler=True, sdxl_latent_size=64),
}
# fmt: on
MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# File names that do not name the model: the name of the folder is used instead.
GENERIC_NAMES = frozenset(
    {"pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model", "model"}
)
# Keys of metadata that may name the variant of a model, or of a LoRA.
MODEL_METADATA_KEYS = ("modelspec.architecture", "modelspec.title", "modelspec.implementation")
LORA_METADATA_KEYS = ("modelspec.title", "ss_output_name")
SCHEDULER_VARIANTS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}  # by diffusers' class
# Few-step LoRAs also change the projections of the timestep embedding in the residual blocks.
TIME_LAYER = re.compile(r"time_emb_proj|emb_layers_1")
TEXT_LAYER = re.compile(r"lora_te|text_encoder|text_model")
DISTILLED_LORA_RANK = 64  # of LCM-LoRA and others


class DetectedVariant(NamedTuple):
    """The variant of a model.

    Args:
        evidence: How it was recognized, for messages.
        path: File or folder of the model or LoRA that has the variant.
    """

    name: str
    evidence: str
    path: Path

    @property
    def defaults(self) -> Defaults:
        """Default sampling options, with the number of steps in the file name."""
        defaults = VARIANTS[self.name].defaults
        steps = NUM_STEPS_PATTERN.search(find_model_name(self.path).lower())
        return replace(defaults, steps=int(steps[1])) if steps else defaults

    def resolve_defaults(self, base: Defaults, *, has_scheduler: bool) -> Defaults:
        """Return the defaults of a model of this variant.

        Args:
            base: Its defaults as an ordinary model.
            has_scheduler: Whether it is from a diffusers folder of SDXL, whose scheduler has set
                sampler and scheduler of `base`.
        """
        if has_scheduler and VARIANTS[self.name].keeps_scheduler:
            return replace(self.defaults, sampler=base.sampler, scheduler=base.scheduler)
        return self.defaults


def detect_variant(
    path: Path, metadata: Mapping[str, str], tensors: Collection[str] = ()
) -> DetectedVariant | None:
    """Return the variant by tensors (our names), metadata, file name or scheduler, or None."""
    for name, variant in VARIANTS.items():
        if variant.marker and variant.marker in tensors:
            return DetectedVariant(name, "its embedding of the guidance scale", path)
    patterns = {name: variant.model_pattern for name, variant in VARIANTS.items()}
    detected = _search_names(patterns, path, metadata, MODEL_METADATA_KEYS)
    scheduler = metadata.get(SCHEDULER_KEY, "")
    if detected is None and scheduler in SCHEDULER_VARIANTS:
        return DetectedVariant(SCHEDULER_VARIANTS[scheduler], f"its `{scheduler}`", path)
    return detected


def detect_lora_variant(path: Path, metadata: Mapping[str, str]) -> DetectedVariant | None:
    """Return the variant that a LoRA turns models into, by metadata or file name, or None."""
    patterns = {name: variant.lora_pattern for name, variant in VARIANTS.items()}
    return _search_names(patterns, path, metadata, LORA_METADATA_KEYS)


def set_variant(
    model: LatentDiffusion, detected: DetectedVariant, *, has_scheduler: bool = False
) -> Callable[[], None]:
    """Set a model's variant; return a function to undo it.

    It determines the defaults, the prediction type, and in SDXL the size, and is recorded in
    `provenance`.

    Args:
        has_scheduler: See `DetectedVariant.resolve_defaults`.
    """
    names = ("defaults", "image_size", "latent_size", "parameterization")
    old_attributes = {name: vars(model)[name] for name in names}
    provenance = model.provenance.copy()
    variant = VARIANTS[detected.name]
    model.defaults = detected.resolve_defaults(model.defaults, has_scheduler=has_scheduler)
    if is_sdxl(model):
        model.image_size = variant.sdxl_latent_size
        model.latent_size = (variant.sdxl_latent_size, variant.sdxl_latent_size)
    model.parameterization = variant.prediction_type or model.parameterization
    model.provenance["variant"] = {
        "name": detected.name, "evidence": detected.evidence, "file": detected.path.name,
    }  # fmt: skip

    def undo() -> None:
        vars(model).update(old_attributes)
        del model.provenance["variant"]
        if "variant" in provenance:
            model.provenance["variant"] = provenance["variant"]

    return undo


def is_variant_fixed(model: LatentDiffusion) -> bool:
    """Return whether LoRAs cannot change the variant, as an argument or a tensor determines it."""
    if model.guidance_embed_dim is not None:
        return True
    variant = model.provenance.get("variant", {})  # None: the argument NO_VARIANT
    return variant is None or variant.get("evidence") == ARGUMENT_EVIDENCE


def find_model_name(path: Path) -> str:
    """Return the stem of a file or folder name; if that is in GENERIC_NAMES, its folder's name.

    In the cache of the Hugging Face hub it is the name of the repository.
    """
    name = path.stem if path.suffix.lower() in MODEL_SUFFIXES else path.name
    names = [name, *(p.name for p in path.parents)]
    names = [name for name in names if name.removesuffix(".fp16") not in GENERIC_NAMES]
    if len(names) > 2 and names[1] == "snapshots":  # models--OWNER--NAME/snapshots/COMMIT
        return names[2]
    return names[0] if names else ""


def looks_distilled(keys: Iterable[str], ranks: Collection[int]) -> bool:
    """Return whether a LoRA has the layers and the rank that few-step LoRAs have."""
    keys = list(keys)
    has_time_layers = any(map(TIME_LAYER.search, keys))
    has_text_layers = any(map(TEXT_LAYER.search, keys))
    return has_time_layers and not has_text_layers and set(ranks) == {DISTILLED_LORA_RANK}


def _search_names(
    patterns: Mapping[str, str], path: Path, metadata: Mapping[str, str], keys: Iterable[str]
) -> DetectedVariant | None:
    """Search metadata, then the file name, for the patterns of variants."""
    sources = {f"metadata `{key}`": metadata.get(key, "") for key in keys}
    sources["the file's name"] = find_model_name(path)
    for source, text in sources.items():
        for name, pattern in patterns.items():
            if re.search(pattern, text.lower()):
                return DetectedVariant(name, source, path)
    return None
