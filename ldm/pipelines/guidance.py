"""Keywords of tasks that choose a rule of guidance; each has a row in RULES."""

from collections.abc import Callable, Sequence
from typing import TypedDict

from ldm.diffusion.guidance import Guidance, SafeGuidance
from ldm.diffusion.names import SLD, SLD_CONCEPTS
from ldm.pipelines.quirks import Quirks
from ldm.runtime.errors import ArgumentError

__all__ = ["GuidanceOptions", "make_rule"]


class GuidanceOptions(TypedDict, total=False):
    """Keywords that choose how guidance combines predictions.

    Attributes:
        sld: Safe latent diffusion: a name in SLD_PRESETS, or five numbers as in `SLD`; None for
            classifier-free guidance alone.
        sld_concept: What it guides away from, a text or a name in SLD_CONCEPTS; None for
            "original". Each model encodes it as it does the prompt, with the same sizes and images.
    """

    sld: str | Sequence[float] | SLD | None
    sld_concept: str | None


def make_rule(options: GuidanceOptions, quirks: Quirks) -> Guidance | None:
    """Make the rule for a run; None for classifier-free guidance.

    Raises:
        ArgumentError: a wrong value.
    """
    rules = [rule for make in RULES.values() if (rule := make(options, quirks))]
    return next(iter(rules), None)


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


RULES: dict[str, Callable[[GuidanceOptions, Quirks], Guidance | None]] = {"sld": _make_safe}
