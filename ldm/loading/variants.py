"""Few-step (distilled) models: how they are recognised, and their default sampling options.

They have the shapes of their family, so they are recognised by metadata or file name; only a latent
consistency model that embeds the guidance scale has a tensor of its own. The first matching row of
VARIANTS applies.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ldm.model import Defaults, LatentDiffusion
from ldm.pipelines.families import is_sdxl

__all__ = [
    "ARGUMENT", "GUIDANCE_WEIGHT", "NO_VARIANT", "SCHEDULER_KEY", "VARIANTS", "Found", "Variant",
    "detect_lora", "detect_variant", "is_variant_given", "looks_distilled", "name_of_file",
    "set_variant",
]  # fmt: skip

NO_VARIANT = "base"
ARGUMENT = "the argument"  # tells a variant, too
SCHEDULER_KEY = "ldm.scheduler"  # in the metadata: the class of a folder's scheduler
GUIDANCE_WEIGHT = "unet.time_embed_cond.weight"


@dataclass(frozen=True)
class Variant:
    """A kind of distilled model, or of LoRA that turns any model into one."""

    title: str  # name in messages
    defaults: Defaults  # of sampling; a file name may contain another number of steps
    name: str  # pattern for metadata and file names of models, in lower case
    lora: str  # pattern for those of LoRAs; stricter, as they are often named after their subject
    marker: str = ""  # name of a tensor that only these models have
    predicts: str | None = None  # prediction type; None = the family's
    keeps_scheduler: bool = False  # whether sampler and scheduler of SDXL's diffusers folders fit
    size_xl: int = 128  # side in latent pixels at which SDXL models of this kind were trained

    def defaults_for(self, name: str) -> Defaults:
        """Return the defaults for a file, whose name may contain the number of steps."""
        steps = STEPS.search(name.lower())
        return replace(self.defaults, steps=int(steps[1])) if steps else self.defaults


STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")


def _word(word: str) -> str:
    """Return a pattern for a word that starts or ends at a word boundary."""
    return rf"(?<![a-z]){word}|{word}(?![a-z])"


# fmt: off
VARIANTS = {
    "lcm-full": Variant(
        "a latent consistency model that embeds the guidance scale",
        Defaults(8.0, 4, "lcm", "lcm", max_steps=16, max_scale=16.0),
        "(?!)", "(?!)", marker=GUIDANCE_WEIGHT),
    "lcm": Variant(
        "LCM",
        Defaults(1.0, 4, "lcm", "lcm", max_steps=16, max_scale=2.5),
        _word("lcm"), r"(?<![a-z])lcm(?![a-z])"),
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
        r"lightning.*1[-_ ]?step.*x0", "(?!)", predicts="x0"),
    "lightning": Variant(
        "Lightning",
        Defaults(1.0, 4, "euler", "trailing", max_steps=12, max_scale=2.5),
        _word("lightning"), r"lightning.*\d[-_ ]?steps?|lightning[-_ ]?lora|xl[-_ ]?lightning",
        keeps_scheduler=True),
    "turbo": Variant(
        "Turbo",
        Defaults(1.0, 4, "euler_a", "turbo", max_steps=10, max_scale=2.5),
        _word("turbo"), r"(sd|xl)[-_ ]?turbo|turbo[-_ ]?(lora|xl)",
        keeps_scheduler=True, size_xl=64),
}
# fmt: on
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# File names without information: the name of the folder is used.
NAMELESS = frozenset({"pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model", "model"})
# Metadata that may name the variant of a model or a LoRA.
METADATA = ("modelspec.architecture", "modelspec.title", "modelspec.implementation")
LORA_METADATA = ("modelspec.title", "ss_output_name")
SCHEDULERS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}  # of diffusers folders
# All published few-step LoRAs also change the layers of the timestep embedding.
TIME_LAYER = re.compile(r"time_emb_proj|emb_layers_1")
TEXT_LAYER = re.compile(r"lora_te|text_encoder|text_model")
LORA_RANK = 64


class Found(NamedTuple):
    """A recognised variant.

    Attributes:
        variant: a name in VARIANTS.
        told_by: how it was recognised, for messages.
        path: the file or folder of the model or LoRA.
    """

    variant: str
    told_by: str
    path: Path

    @property
    def defaults(self) -> Defaults:
        """Default sampling options, with the number of steps in the file name."""
        return VARIANTS[self.variant].defaults_for(name_of_file(self.path))

    def defaults_of(self, base: Defaults, *, has_scheduler: bool) -> Defaults:
        """Return the defaults of a model.

        Args:
            base: those that it has without being this variant.
            has_scheduler: it comes from a diffusers folder of SDXL, which says how it is sampled.
        """
        if has_scheduler and VARIANTS[self.variant].keeps_scheduler:
            return replace(self.defaults, sampler=base.sampler, scheduler=base.scheduler)
        return self.defaults


def detect_variant(
    path: Path, metadata: Mapping[str, str], tensors: Collection[str] = ()
) -> Found | None:
    """Return the variant by tensors (our names), metadata, file name or scheduler, or None."""
    for variant, row in VARIANTS.items():
        if row.marker and row.marker in tensors:
            return Found(variant, "its embedding of the guidance scale", path)
    patterns = {variant: row.name for variant, row in VARIANTS.items()}
    found = _search(patterns, path, {key: metadata.get(key, "") for key in METADATA})
    scheduler = metadata.get(SCHEDULER_KEY, "")
    if found is None and scheduler in SCHEDULERS:
        return Found(SCHEDULERS[scheduler], f"its `{scheduler}`", path)
    return found


def detect_lora(path: Path, metadata: Mapping[str, str]) -> Found | None:
    """Return the variant that a LoRA makes of a model, by metadata or file name; None = none."""
    patterns = {variant: row.lora for variant, row in VARIANTS.items()}
    return _search(patterns, path, {key: metadata.get(key, "") for key in LORA_METADATA})


def set_variant(
    model: LatentDiffusion, found: Found, *, has_scheduler: bool = False
) -> Callable[[], None]:
    """Set the defaults of a model for few steps, and what it predicts; return what undoes it.

    Args:
        has_scheduler: see `Found.defaults_of`.
    """
    names = ("defaults", "image_size", "latent_size", "parameterization")
    before = {name: vars(model)[name] for name in names}
    told = {"variant": model.provenance["variant"]} if "variant" in model.provenance else {}
    row = VARIANTS[found.variant]
    model.defaults = found.defaults_of(model.defaults, has_scheduler=has_scheduler)
    if is_sdxl(model):
        model.image_size = row.size_xl
        model.latent_size = (row.size_xl, row.size_xl)
    model.parameterization = row.predicts or model.parameterization
    model.provenance["variant"] = {
        "name": found.variant, "told_by": found.told_by, "file": found.path.name,
    }  # fmt: skip

    def undo() -> None:
        vars(model).update(before)
        del model.provenance["variant"]
        model.provenance.update(told)

    return undo


def is_variant_given(model: LatentDiffusion) -> bool:
    """Return whether LoRAs cannot change the variant: it was an argument, or a tensor tells it."""
    found = model.provenance.get("variant", {})
    return found is None or found.get("told_by") == ARGUMENT or model.guidance_embed_dim is not None


def name_of_file(path: Path) -> str:
    """Return the stem of a file or folder name; of its folder if the name is in NAMELESS.

    In the cache of the Hugging Face hub it is the name of the repository.
    """
    names = [path.stem if path.suffix in SUFFIXES else path.name, *(p.name for p in path.parents)]
    names = [name for name in names if name not in NAMELESS]
    if len(names) > 2 and names[1] == "snapshots":
        return names[2]
    return names[0] if names else ""


def looks_distilled(keys: Iterable[str], ranks: Collection[int]) -> bool:
    """Return whether a LoRA has the layers and the rank of published few-step LoRAs."""
    keys = list(keys)
    has_time = any(map(TIME_LAYER.search, keys))
    return has_time and set(ranks) == {LORA_RANK} and not any(map(TEXT_LAYER.search, keys))


def _search(patterns: Mapping[str, str], path: Path, metadata: Mapping[str, str]) -> Found | None:
    sources = {f"metadata `{key}`": text for key, text in metadata.items()}
    sources["the file's name"] = name_of_file(path)
    for source, text in sources.items():
        for variant, pattern in patterns.items():
            if re.search(pattern, text.lower()):
                return Found(variant, source, path)
    return None
