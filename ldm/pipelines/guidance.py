"""Keywords of tasks that choose a rule of guidance; each has a row in RULES."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict, cast

from ldm.diffusion.guidance import (
    Guidance,
    PerpNeg,
    PerturbedAttention,
    ProjectedGuidance,
    SafeGuidance,
    Scale,
)
from ldm.diffusion.names import APG, SLD, SLD_CONCEPTS, check_rules
from ldm.model import LatentDiffusion
from ldm.nets.unet import UNet
from ldm.pipelines.families import file_name
from ldm.pipelines.freeu import make_freeu
from ldm.pipelines.quirks import Quirks
from ldm.runtime.errors import ArgumentError

__all__ = ["GuidanceOptions", "check_guidance", "make_rule"]


class GuidanceOptions(TypedDict, total=False):
    """Keywords that choose how guidance combines predictions.

    Attributes:
        sld: Safe latent diffusion: a name in SLD_PRESETS, or five numbers as in `SLD`; None for
            classifier-free guidance alone.
        sld_concept: What it guides away from, a text or a name in SLD_CONCEPTS; None for
            "original". Each model encodes it as it does the prompt, with the same sizes and images.
        apg: Adaptive projected guidance: three numbers as in `APG`.
        perp_neg: Perp-neg: the weight of the negative prompt, of which only what is perpendicular
            to the prompt counts; 1 as published.
        pag: Perturbed-attention guidance: its scale; 3 as published. It adds to any other rule.
    """

    sld: str | Sequence[float] | SLD | None
    sld_concept: str | None
    apg: Sequence[float] | APG | None
    perp_neg: float | None
    pag: float | None


def make_rule(options: GuidanceOptions, quirks: Quirks) -> Guidance | None:
    """Make the rule for a run; None for classifier-free guidance.

    Raises:
        ArgumentError: a wrong value.
    """
    rules = (rule for make in RULES.values() if (rule := make(options, quirks)))
    rule = next(rules, None)
    if (scale := options.get("pag")) is None:
        return rule
    return PerturbedAttention(_positive("pag", scale), rule or Guidance())


def check_guidance(
    model: LatentDiffusion, scale: Scale | None, keywords: Mapping[str, object]
) -> None:
    """Raise ArgumentError for rules, or FreeU, that a model can't have or that change nothing.

    Args:
        scale: of guidance; None = the model's default.
        keywords: of a task; those that choose no rule are ignored.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    rules = [name for name in GuidanceOptions.__annotations__ if name in given]
    scale = model.defaults.scale if scale is None else scale
    check_rules(given, None if callable(scale) else scale)
    if "freeu" in given:
        version = cast(str | None, given.get("freeu_version"))
        make_freeu(model, cast(str | Sequence[float], given["freeu"]), version)
    if not rules:
        return
    quirks = Quirks.of(model, cast(Iterable[str], given.get("legacy", ())))
    make_rule(cast(GuidanceOptions, given), quirks)
    if not isinstance(model.unet, UNet):
        raise ArgumentError(f"{rules[0]} is not for the x2 latent upscaler", rules[0])
    if "perp_neg" in rules:
        negatives = (given.get(f"negative_prompt{suffix}", "") for suffix in ("", "_2"))
        if not any(map(any, cast(Iterable[Iterable[str]], negatives))):
            raise ArgumentError("perp_neg needs a negative prompt", "perp_neg")
        if quirks.ignores_negative(after_base=False):
            message = "perp_neg needs the negative prompt, which `ignore-negative` ignores"
            raise ArgumentError(message, "legacy")
    if "pag" in rules and not model.unet.attends_in_middle:
        message = "pag needs self-attention in the middle block of the UNet: that of "
        raise ArgumentError(f"{message}{file_name(model)} has none", "pag")


def _make_safe(options: GuidanceOptions, quirks: Quirks) -> Guidance | None:
    sld, concept = options.get("sld"), options.get("sld_concept")
    if sld is None:
        if concept is not None:
            raise ArgumentError("sld_concept needs sld", "sld_concept")
        return None
    settings = SLD.of(sld)
    if "sld-off" in quirks and settings.scale <= 1:
        return None
    concept = "original" if concept is None else concept
    return SafeGuidance(settings, SLD_CONCEPTS.get(concept, concept))


def _make_projected(options: GuidanceOptions, quirks: Quirks) -> Guidance | None:
    apg = options.get("apg")
    return None if apg is None else ProjectedGuidance(APG.of(apg))


def _make_perp_neg(options: GuidanceOptions, quirks: Quirks) -> Guidance | None:
    weight = options.get("perp_neg")
    return None if weight is None else PerpNeg(_positive("perp_neg", weight))


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ArgumentError(f"{name} must be above 0, got {value:g}", name)
    return value


# Of these one can hold; perturbed-attention guidance adds to it.
RULES: dict[str, Callable[[GuidanceOptions, Quirks], Guidance | None]] = {
    "sld": _make_safe,
    "apg": _make_projected,
    "perp_neg": _make_perp_neg,
}
