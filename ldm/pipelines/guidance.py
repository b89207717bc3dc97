"""Keywords of tasks that select a guidance method, and functions that build and check it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict, cast

from ldm.diffusion.guidance import (
    Guidance,
    GuidanceScale,
    PerpNeg,
    PerturbedAttention,
    ProjectedGuidance,
    SafeGuidance,
)
from ldm.diffusion.names import APG, SLD, SLD_CONCEPTS, check_guidance_options
from ldm.model import LatentDiffusion
from ldm.nets.unet import UNet
from ldm.pipelines.families import quote_name
from ldm.pipelines.freeu import make_freeu
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import get_default_scale
from ldm.runtime.errors import ArgumentError

__all__ = ["GuidanceOptions", "check_guidance", "make_guidance"]


class GuidanceOptions(TypedDict, total=False):
    """Keywords that select the guidance method, by default classifier-free guidance (CFG).

    At most one of `sld`, `apg` and `perp_neg`; `pag` combines with each, and with CFG.

    Attributes:
        sld: Safe latent diffusion: a name in SLD_PRESETS, or five numbers as in `SLD`.
        sld_concept: The concept that it guides away from: a text, or a name in SLD_CONCEPTS; None =
            "original". It is encoded as the prompt, with the same sizes and images.
        apg: Adaptive projected guidance: three numbers as in `APG`.
        perp_neg: Perp-Neg: weight of the component of the negative prompt perpendicular to the
            prompt; 1 as published.
        pag: Perturbed-attention guidance: its scale; 3 as published.
    """

    sld: str | Sequence[float] | SLD | None
    sld_concept: str | None
    apg: Sequence[float] | APG | None
    perp_neg: float | None
    pag: float | None


def make_guidance(options: GuidanceOptions, quirks: Quirks) -> Guidance | None:
    """Build the guidance method, a new object for each run; None = classifier-free guidance."""
    guidance: Guidance | None = _make_safe_guidance(options, quirks)
    if (apg := options.get("apg")) is not None:
        guidance = ProjectedGuidance(APG.parse(apg))
    if (weight := options.get("perp_neg")) is not None:
        guidance = PerpNeg(_check_positive("perp_neg", weight))
    if (scale := options.get("pag")) is not None:
        guidance = PerturbedAttention(_check_positive("pag", scale), guidance or Guidance())
    return guidance


def check_guidance(
    model: LatentDiffusion,
    scale: GuidanceScale | None,
    arguments: Mapping[str, object],
    quirks: Quirks,
) -> None:
    """Raise ArgumentError for guidance or FreeU without effect, or not supported by the model.

    Args:
        scale: Guidance scale; None = the default of the sampler or the model.
        arguments: All arguments of a task by name.
    """
    values = {name: value for name, value in arguments.items() if value is not None}
    methods = [name for name in GuidanceOptions.__annotations__ if name in values]
    sampler = cast(str | None, values.get("sampler"))
    scale = get_default_scale(model, sampler) if scale is None else scale
    check_guidance_options(values, None if callable(scale) else scale)
    if "freeu" in values:
        version = cast(str | None, values.get("freeu_version"))
        make_freeu(model, cast(str | Sequence[float], values["freeu"]), version)
    if methods and not isinstance(model.unet, UNet):
        raise ArgumentError(f"{methods[0]} is not for the x2 latent upscaler", methods[0])
    if "perp_neg" in methods:
        # Each is a text or a list of texts: `any` is false if all are empty.
        negatives = (values.get(f"negative_prompt{suffix}", "") for suffix in ("", "_2"))
        if not any(map(any, cast(Iterable[Iterable[str]], negatives))):
            raise ArgumentError("perp_neg needs a negative prompt", "perp_neg")
        if quirks.ignores_negative(after_base=False):
            message = "perp_neg needs the negative prompt, which `ignore-negative` ignores"
            raise ArgumentError(message, "legacy")
    if "pag" in methods and not model.unet.has_middle_self_attention:
        message = "pag needs self-attention in the middle block of the UNet: that of "
        raise ArgumentError(f"{message}{quote_name(model)} has none", "pag")


def _make_safe_guidance(options: GuidanceOptions, quirks: Quirks) -> SafeGuidance | None:
    sld, concept = options.get("sld"), options.get("sld_concept")
    if sld is None:
        if concept is not None:
            raise ArgumentError("sld_concept needs sld", "sld_concept")
        return None
    settings = SLD.parse(sld)
    if "sld-off" in quirks and settings.scale <= 1:  # diffusers takes that as "off"
        return None
    concept = "original" if concept is None else concept
    return SafeGuidance(settings, SLD_CONCEPTS.get(concept, concept))


def _check_positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ArgumentError(f"{name} must be above 0, got {value:g}", name)
    return value
