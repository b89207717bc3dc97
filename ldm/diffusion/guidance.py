"""Guidance: combines a denoiser, two conditions and a rule into `denoise(x, sigma)`.

A rule is a subclass of `Guidance`, which is classifier-free guidance itself. It combines the
predictions of one evaluation of the network, may ask for those of further texts, and may remember
earlier evaluations.

Ho and Salimans 2022 (arXiv:2207.12598); rescale: Lin et al. 2023 (arXiv:2305.08891, §3.4);
interval: Kynkäänniemi et al. 2024 (arXiv:2404.07724); safe latent diffusion: Schramowski et al.
2023 (arXiv:2211.05105).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.names import SLD
from ldm.diffusion.samplers.common import Denoise
from ldm.runtime.errors import ArgumentError

__all__ = [
    "Denoise", "Evaluation", "Guidance", "SafeGuidance", "Scale", "StepCounter", "add_guidance",
    "follow_schedule", "limit_to_interval",
]  # fmt: skip

Scale = float | Callable[[float], float]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network: its predictions (eps, v or x0) at x, (B, C, h, w) each.

    Attributes:
        scale: Guidance scale; 1 for CFG++ only.
        uncond, cond: Predictions for the negative prompt and the prompt.
        further: Predictions for the texts of the rule.
    """

    denoiser: Denoiser
    x: Tensor
    sigma: float
    scale: float
    uncond: Tensor
    cond: Tensor
    further: tuple[Tensor, ...]

    @property
    def eps_factor(self) -> Tensor:
        """Factor (1, 1, 1, 1) from a difference of predictions to that of their eps."""
        return self.denoiser.eps_factor(self.x, self.sigma)


class Guidance:
    """Classifier-free guidance, and the base of other rules. One object serves one run.

    Attributes:
        texts: Texts whose predictions the rule needs beside those of prompt and negative prompt.
        calls: Evaluations of the network so far, those without guidance among them.
    """

    texts: tuple[str, ...] = ()
    calls = 0

    def combine(self, evaluation: Evaluation) -> Tensor:
        """Combine predictions to one, (B, C, h, w)."""
        uncond = evaluation.uncond
        return uncond + evaluation.scale * (evaluation.cond - uncond)

    def explain_idle(self) -> str | None:
        """Say, after a run, why the rule changed nothing; None if it did."""
        return None


class SafeGuidance(Guidance):
    """Safe latent diffusion: guides away from a concept where the prompt comes near it.

    Per element, in units of eps: with u, t, s of negative prompt, prompt and concept,

        d = t - s,  phi = 0 where d >= threshold, else min(abs(d) scale, 1)
        gamma = phi (s - u) + momentum_scale nu,      nu <- beta nu + (1 - beta) gamma
        u + g (t - u - gamma), with gamma from call number `warmup` on.

    It was published for models that predict eps; the eps of other predictions is that of the same
    estimate.

    Args:
        concept: The text of what is to be avoided.
    """

    def __init__(self, settings: SLD, concept: str) -> None:
        self.settings = settings
        self.texts = (concept,)
        self._momentum: Tensor | None = None

    def combine(self, evaluation: Evaluation) -> Tensor:
        own, factor = self.settings, evaluation.eps_factor
        uncond, cond, (concept,) = evaluation.uncond, evaluation.cond, evaluation.further
        difference = (cond - concept) * factor
        strength = (difference.abs() * own.scale).clamp(max=1.0)
        strength = strength.masked_fill(difference >= own.threshold, 0)
        safety = (concept - uncond) * factor * strength
        momentum = torch.zeros_like(safety) if self._momentum is None else self._momentum
        safety = safety + own.momentum_scale * momentum
        self._momentum = own.momentum_beta * momentum + (1 - own.momentum_beta) * safety
        guidance = cond - uncond
        if self.calls >= own.warmup:
            guidance = guidance - safety / factor
        return uncond + evaluation.scale * guidance

    def explain_idle(self) -> str | None:
        if self._momentum is None:
            return "sld had no effect: there was no guidance, whose scale must not be 1"
        if self.calls <= self.settings.warmup:
            return (
                f"sld had no effect: its warmup of {self.settings.warmup} is not below the "
                f"{self.calls} evaluations of the network in this run"
            )
        return None


class StepCounter:
    """Counts the steps of a sampler, for conditions that depend on the step.

    Attributes:
        step: From 0; all evaluations of the network in a step have the same.
    """

    def __init__(self, first: int = 0) -> None:
        self.step = first


def follow_schedule(
    guide: Callable[[Cond | Composition, Cond | None], Denoise],
    cond: AnyCond,
    uncond: Cond | ScheduledCond | None,
    counter: StepCounter,
) -> Denoise:
    """Build `denoise(x, sigma)` whose conditions are those of the step.

    Args:
        guide: Builds it for conditions that stay.
    """
    if not isinstance(cond, ScheduledCond) and not isinstance(uncond, ScheduledCond):
        return guide(cond, uncond)
    built: dict[tuple[int, int], Denoise] = {}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        current = cond.at(counter.step) if isinstance(cond, ScheduledCond) else cond
        null = uncond.at(counter.step) if isinstance(uncond, ScheduledCond) else uncond
        assert not isinstance(null, Composition)
        key = (id(current), id(null))
        if key not in built:
            built.clear()  # those of earlier steps take memory
            built[key] = guide(current, null)
        return built[key](x, sigma)

    return denoise


def add_guidance(
    denoiser: Denoiser,
    cond: Cond | Composition,
    uncond: Cond | None = None,
    scale: Scale = 1.0,
    *,
    rescale: float = 0.0,
    rule: Guidance | None = None,
    further: Sequence[Cond] = (),
    on_uncond: Callable[[Tensor], object] | None = None,
) -> Denoise:
    """Build `denoise(x, sigma)` with guidance.

    The network runs once for all conditions, the unconditional one first. Rules combine
    predictions (eps, v or x0), not estimates of z, as in the original. The conditional prediction
    of a composition is that of its prompts together.

    Args:
        uncond: Condition of the empty or the negative prompt; None for no guidance.
        scale: Guidance scale, which may depend on sigma. At 1 only `cond` is computed, unless it is
            a composition.
        rescale: 0 … 1, strength of rescaling the prediction to the standard deviation of the
            conditional one, against over-exposure at high scales.
        rule: How predictions are combined; None for classifier-free guidance.
        further: Conditions of `rule.texts`.
        on_uncond: Called with each estimate without the prompt, which is then also computed at a
            scale of 1.
    """
    rule = rule or Guidance()
    if isinstance(cond, Cond) and (uncond is None or (scale == 1 and on_uncond is None)):
        return lambda x, sigma: denoiser(x, sigma, cond)
    if uncond is None:
        raise ArgumentError("a composition of prompts needs the unconditional condition")
    if len(further) != len(rule.texts):
        raise ArgumentError(f"{len(further)} conditions were given for {len(rule.texts)} texts")
    conditions = uncond.cat(cond if isinstance(cond, Cond) else cond.cond)
    for condition in further:
        conditions = conditions.cat(condition)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        current_scale = scale(sigma) if callable(scale) else scale
        if current_scale == 1 and on_uncond is None and isinstance(cond, Cond):
            rule.calls += 1
            return denoiser(x, sigma, cond)
        x_cond = x if isinstance(cond, Cond) else x[cond.rows.to(x.device)]
        inputs = [x, x_cond, *[x] * len(further)]
        prediction = denoiser.predict(torch.cat(inputs), sigma, conditions)
        pred_uncond, pred_cond, *others = prediction.split([len(part) for part in inputs])
        if isinstance(cond, Composition):
            pred_cond = cond.compose(pred_uncond, pred_cond)
        evaluation = Evaluation(
            denoiser, x, sigma, current_scale, pred_uncond, pred_cond, tuple(others)
        )
        prediction = rule.combine(evaluation)
        rule.calls += 1
        if on_uncond is not None:
            on_uncond(denoiser.convert_prediction(x, sigma, pred_uncond))
        if rescale:
            prediction = _rescale(prediction, pred_cond, rescale)
        return denoiser.convert_prediction(x, sigma, prediction)

    return denoise


def limit_to_interval(scale: Scale, low: float, high: float) -> Scale:
    """Limit guidance to noise levels (sigma) low … high; elsewhere the scale is 1."""

    def scale_at(sigma: float) -> float:
        if not low <= sigma <= high:
            return 1.0
        return scale(sigma) if callable(scale) else scale

    return scale_at


def _rescale(prediction: Tensor, pred_cond: Tensor, weight: float) -> Tensor:
    dims = tuple(range(1, pred_cond.dim()))
    ratio = pred_cond.std(dims, keepdim=True) / prediction.std(dims, keepdim=True)
    return prediction * (1 - weight + weight * ratio)
