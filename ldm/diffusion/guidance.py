"""Guidance: combines a denoiser, conditions and a guidance method into `denoise(x, sigma)`.

A method is a subclass of `Guidance`, which is classifier-free guidance itself. It combines the
predictions of one evaluation of the network, may need predictions for extra texts, and may use
earlier evaluations. Methods exclude each other, except perturbed-attention guidance, which adds a
term to any other.

Ho and Salimans 2022 (arXiv:2207.12598); guidance_rescale: Lin et al. 2023 (arXiv:2305.08891, §3.4);
interval: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.names import APG, SLD
from ldm.diffusion.samplers.common import Denoise
from ldm.runtime.errors import ArgumentError

__all__ = [
    "CurrentStep", "Denoise", "Evaluation", "Guidance", "GuidanceScale", "PerpNeg",
    "PerturbedAttention", "ProjectedGuidance", "SafeGuidance", "add_guidance",
    "build_scheduled_denoise",
]  # fmt: skip

GuidanceScale = float | Callable[[float], float]
TINY = torch.finfo(torch.float32).tiny  # against division by 0


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network: its predictions (eps, v or x0) at x, (B, C, h, w) each.

    Args:
        denoiser: The denoiser whose network made the predictions.
        x: Input of the denoiser, (B, C, h, w).
        sigma: Noise level of x.
        scale: Guidance scale; 1 with perturbed attention alone.
        pred_uncond, pred_cond: Predictions for the negative prompt and the prompt; both are for the
            prompt if the negative one is not needed.
        pred_extra: Predictions for `Guidance.texts`; () with perturbed attention alone.
        pred_perturbed: Prediction for the prompt with perturbed self-attention; None unless
            `Guidance.needs_perturbed`.
    """

    denoiser: Denoiser
    x: Tensor
    sigma: float
    scale: float
    pred_uncond: Tensor
    pred_cond: Tensor
    pred_extra: tuple[Tensor, ...]
    pred_perturbed: Tensor | None = None

    def estimate(self, prediction: Tensor) -> Tensor:
        """Convert a prediction to the estimate of z, (B, C, h, w)."""
        return self.denoiser.convert_prediction(self.x, self.sigma, prediction)


class Guidance:
    """Classifier-free guidance, and the base class of other methods. An object is for one run.

    Attributes:
        name: Keyword of the tasks that selects the method; "" for classifier-free guidance.
        texts: Texts, besides prompt and negative prompt, for which the method needs predictions;
            "" is the unconditional prompt of the model.
        needs_perturbed: Whether it also needs the prediction with perturbed self-attention.
        num_evaluations: Number of evaluations of the network so far.
        num_guided: Number of those with guidance.
    """

    name = ""
    texts: tuple[str, ...] = ()
    needs_perturbed = False
    num_evaluations = 0
    num_guided = 0

    def combine(self, evaluation: Evaluation) -> Tensor:
        """Combine predictions to u + scale (c - u), (B, C, h, w)."""
        uncond = evaluation.pred_uncond
        return uncond + evaluation.scale * (evaluation.pred_cond - uncond)

    def explain_no_effect(self) -> str | None:
        """Return, after a run, the reason why the method had no effect; None if it had one."""
        if self.name and self.num_evaluations and not self.num_guided:
            return f"{self.name} had no effect: there was no guidance at any noise level of the run"
        return None

    def count_evaluation(self, *, is_guided: bool) -> None:
        """Count an evaluation of the network."""
        self.num_evaluations += 1
        self.num_guided += is_guided


class SafeGuidance(Guidance):
    """Safe latent diffusion: guides away from a concept where the prediction is close to it.

    Per element, with eps u, c and s for negative prompt, prompt and concept,

        d = c - s,    phi = 0 where d >= threshold, else min(abs(d) scale, 1)
        gamma = phi (s - u) + momentum_scale nu,    then nu <- beta nu + (1 - beta) gamma
        u + guidance scale (c - u - gamma),    without gamma in the first `warmup` evaluations.

    Schramowski et al. 2023 (arXiv:2211.05105), as in the authors' code. It was published for models
    that predict eps; other predictions are converted to eps and back.
    """

    def __init__(self, settings: SLD, concept: str) -> None:
        self.settings = settings
        self.texts = (concept,)
        self._momentum: Tensor | None = None

    def combine(self, evaluation: Evaluation) -> Tensor:
        settings = self.settings
        factor = evaluation.denoiser.compute_eps_factor(evaluation.x, evaluation.sigma)
        uncond, cond, (concept,) = (
            evaluation.pred_uncond,
            evaluation.pred_cond,
            evaluation.pred_extra,
        )
        difference = (cond - concept) * factor
        strength = (difference.abs() * settings.scale).clamp(max=1.0)
        strength = strength.masked_fill(difference >= settings.threshold, 0)
        safety = (concept - uncond) * factor * strength
        momentum = torch.zeros_like(safety) if self._momentum is None else self._momentum
        safety = safety + settings.momentum_scale * momentum
        beta = settings.momentum_beta
        self._momentum = beta * momentum + (1 - beta) * safety
        guidance = cond - uncond
        if self.num_evaluations >= settings.warmup:
            guidance = guidance - safety / factor
        return uncond + evaluation.scale * guidance

    def explain_no_effect(self) -> str | None:
        if self._momentum is None:
            return "sld had no effect: it needs a guidance scale other than 1"
        if self.num_evaluations <= self.settings.warmup:
            return (
                f"sld had no effect: its warmup of {self.settings.warmup} is not below the "
                f"{self.num_evaluations} evaluations of the network in this run"
            )
        return None


class ProjectedGuidance(Guidance):
    """Adaptive projected guidance: damps the component of the update that oversaturates images.

    Per sample, with the estimates u and c of z for negative prompt and prompt,

        d <- c - u + momentum d
        d min(1, norm / ||d||) = parallel + orthogonal,    the components relative to c
        c + (scale - 1) (orthogonal + eta parallel).

    Sadat et al. 2024 (arXiv:2410.02416).
    """

    name = "apg"

    def __init__(self, settings: APG) -> None:
        self.settings = settings
        self._momentum: Tensor | None = None

    def combine(self, evaluation: Evaluation) -> Tensor:
        settings, cond = self.settings, evaluation.pred_cond
        factor = evaluation.denoiser.compute_denoised_factor(evaluation.x, evaluation.sigma)
        difference = (cond - evaluation.pred_uncond) * factor
        if self._momentum is not None:
            difference = difference + settings.momentum * self._momentum
        if settings.momentum:
            self._momentum = difference
        if settings.norm:
            norm = difference.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            difference = difference * (settings.norm / norm).clamp(max=1)
        parallel = _project(difference, evaluation.estimate(cond))
        update = difference + (settings.eta - 1) * parallel
        return cond + (evaluation.scale - 1) * update / factor


class PerpNeg(Guidance):
    """Perp-Neg: keeps only the component of the negative prompt perpendicular to the prompt.

    Per sample, with the predictions e, n and c for empty prompt, negative prompt and prompt,

        pos = c - e,    neg = n - e
        e + scale (pos - weight (neg - projection of neg on pos)).

    Armandpour et al. 2023 (arXiv:2304.04968).
    """

    name = "perp_neg"
    texts = ("",)

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def combine(self, evaluation: Evaluation) -> Tensor:
        (empty,) = evaluation.pred_extra
        positive, negative = evaluation.pred_cond - empty, evaluation.pred_uncond - empty
        perpendicular = negative - _project(negative, positive)
        return empty + evaluation.scale * (positive - self.weight * perpendicular)


class PerturbedAttention(Guidance):
    """Perturbed-attention guidance: guides away from predictions without structure.

        prediction of the base method + pag_scale (c - p)

    c is the prediction for the prompt, p the same with identity self-attention in the UNet's middle
    block. It needs no unconditional prediction: none is computed at a guidance scale of 1.
    Ahn et al. 2024 (arXiv:2403.17377).

    Args:
        base: The method to which it adds a term.
    """

    name = "pag"
    needs_perturbed = True

    def __init__(self, pag_scale: float, base: Guidance) -> None:
        self.pag_scale = pag_scale
        self.base = base
        self.texts = base.texts

    def combine(self, evaluation: Evaluation) -> Tensor:
        cond = evaluation.pred_cond
        assert evaluation.pred_perturbed is not None
        guided = cond if evaluation.scale == 1 else self.base.combine(evaluation)
        return guided + self.pag_scale * (cond - evaluation.pred_perturbed)

    def explain_no_effect(self) -> str | None:
        return super().explain_no_effect() or self.base.explain_no_effect()

    def count_evaluation(self, *, is_guided: bool) -> None:
        super().count_evaluation(is_guided=is_guided)
        self.base.count_evaluation(is_guided=is_guided)


class CurrentStep:
    """The current step of a sampler, for conditions that depend on it.

    Attributes:
        step: Counted from 0; the same for all evaluations of the network in a step.
    """

    def __init__(self, step: int = 0) -> None:
        self.step = step


def build_scheduled_denoise(
    build_denoise: Callable[[Cond | Composition, Cond | None], Denoise],
    cond: AnyCond,
    uncond: Cond | ScheduledCond | None,
    current_step: CurrentStep,
) -> Denoise:
    """Build `denoise(x, sigma)` with the conditions of the current step.

    Args:
        build_denoise: Builds it for conditions that do not depend on the step, see `add_guidance`.
        uncond: None = no guidance.
    """
    if not isinstance(cond, ScheduledCond) and not isinstance(uncond, ScheduledCond):
        return build_denoise(cond, uncond)
    cache: dict[tuple[int, int], Denoise] = {}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        step_cond = cond.at(current_step.step) if isinstance(cond, ScheduledCond) else cond
        step_uncond = uncond.at(current_step.step) if isinstance(uncond, ScheduledCond) else uncond
        assert not isinstance(step_uncond, Composition)
        key = (id(step_cond), id(step_uncond))
        if key not in cache:
            cache.clear()  # to free the concatenated conditions of earlier steps
            cache[key] = build_denoise(step_cond, step_uncond)
        return cache[key](x, sigma)

    return denoise


def add_guidance(
    denoiser: Denoiser,
    cond: Cond | Composition,
    uncond: Cond | None = None,
    scale: GuidanceScale = 1.0,
    *,
    guidance_rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    guidance: Guidance | None = None,
    extra_conds: Sequence[Cond] = (),
    on_uncond_denoised: Callable[[Tensor], object] | None = None,
) -> Denoise:
    """Build `denoise(x, sigma)` with guidance.

    The network runs once on a batch of all conditions, the unconditional one first. As in the
    original, methods combine predictions (eps, v or x0), not estimates of z. Predictions for the
    subprompts of a composition are combined to one conditional prediction.

    Args:
        uncond: Condition of the empty or the negative prompt; None = no guidance.
        scale: Guidance scale, or a function of sigma. At 1 the unconditional prediction is not
            computed, unless `cond` is a composition.
        guidance_rescale: Strength, 0 … 1, of rescaling the prediction to the standard deviation of
            the conditional one, against over-exposure at high scales.
        interval: Lowest and highest noise level (sigma) with guidance; elsewhere only `cond` is
            computed. None = all levels.
        guidance: How predictions are combined; None = classifier-free guidance.
        extra_conds: Conditions of the texts that the method needs besides the prompts,
            `guidance.texts`.
        on_uncond_denoised: Called with each unconditional estimate of z (B, C, h, w), which is then
            also computed at a scale of 1; None = not called. CFG++ samplers need it.
    """
    guidance = guidance or Guidance()
    on_uncond_denoised = None if uncond is None else on_uncond_denoised
    prompt_cond = cond.cond if isinstance(cond, Composition) else cond
    if isinstance(cond, Composition) and uncond is None:
        raise ArgumentError("a composition of prompts needs the unconditional condition")
    if uncond is None or (scale == 1 and on_uncond_denoised is None):
        if isinstance(cond, Cond) and not guidance.needs_perturbed:
            return lambda x, sigma: denoiser(x, sigma, cond)
        scale = 1.0
    elif len(extra_conds) != len(guidance.texts):
        counts = f"{len(extra_conds)} conditions were given for {len(guidance.texts)} texts"
        raise ArgumentError(counts, "extra_conds")
    min_sigma, max_sigma = (-math.inf, math.inf) if interval is None else interval

    @functools.cache
    def concatenate(has_uncond: bool, is_guided: bool, needs_perturbed: bool) -> Cond:
        """Concatenate the conditions of one evaluation of the network along the batch axis."""
        conditions = [prompt_cond]
        if has_uncond:
            assert uncond is not None
            conditions = [uncond, prompt_cond, *(extra_conds if is_guided else ())]
        batch = functools.reduce(Cond.cat_samples, conditions)
        return _append_perturbed(batch, prompt_cond) if needs_perturbed else batch

    def evaluate(
        x: Tensor,
        sigma: float,
        scale: float,
        *,
        has_uncond: bool,
        is_guided: bool,
        needs_perturbed: bool,
    ) -> Evaluation:
        """Run the network once, on the conditions that are needed."""
        x_cond = x[cond.sample_indices.to(x.device)] if isinstance(cond, Composition) else x
        inputs = [x, x_cond] if has_uncond else [x_cond]
        inputs += [x] * len(extra_conds) if is_guided else []
        inputs += [x_cond] if needs_perturbed else []
        conditions = concatenate(has_uncond, is_guided, needs_perturbed)
        prediction = denoiser.predict(torch.cat(inputs), sigma, conditions)
        predictions = list(prediction.split([len(value) for value in inputs]))
        pred_perturbed = predictions.pop() if needs_perturbed else None
        pred_uncond, pred_cond, *pred_extra = predictions if has_uncond else predictions * 2
        if isinstance(cond, Composition):
            pred_cond = cond.compose(pred_uncond, pred_cond)
            if pred_perturbed is not None:
                pred_perturbed = cond.compose(pred_uncond, pred_perturbed)
        return Evaluation(
            denoiser, x, sigma, scale, pred_uncond, pred_cond, tuple(pred_extra), pred_perturbed
        )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        is_in_interval = min_sigma <= sigma <= max_sigma
        current_scale = scale(sigma) if callable(scale) else scale
        if not is_in_interval:
            current_scale = 1.0
        is_guided = current_scale != 1 or (on_uncond_denoised is not None and is_in_interval)
        needs_perturbed = is_in_interval and guidance.needs_perturbed
        has_uncond = is_guided or on_uncond_denoised is not None or isinstance(cond, Composition)
        if not has_uncond and not needs_perturbed:
            guidance.count_evaluation(is_guided=False)
            return denoiser(x, sigma, prompt_cond)
        evaluation = evaluate(
            x,
            sigma,
            current_scale,
            has_uncond=has_uncond,
            is_guided=is_guided,
            needs_perturbed=needs_perturbed,
        )
        has_effect = is_guided or needs_perturbed
        prediction = guidance.combine(evaluation) if has_effect else evaluation.pred_cond
        guidance.count_evaluation(is_guided=has_effect)
        if on_uncond_denoised is not None:
            on_uncond_denoised(evaluation.estimate(evaluation.pred_uncond))
        if guidance_rescale:
            prediction = _rescale_std(prediction, evaluation.pred_cond, guidance_rescale)
        return evaluation.estimate(prediction)

    return denoise


def _append_perturbed(conditions: Cond, prompt_cond: Cond) -> Cond:
    """Append the conditions of the prompts again, with perturbed self-attention."""
    is_perturbed = torch.arange(len(conditions) + len(prompt_cond)) >= len(conditions)
    return replace(conditions.cat_samples(prompt_cond), perturbed=is_perturbed)


def _project(x: Tensor, direction: Tensor) -> Tensor:
    """Return the component of x parallel to a direction, for each sample; both (B, C, h, w)."""
    dims = (1, 2, 3)
    norm_squared = (direction * direction).sum(dims, keepdim=True)
    return (x * direction).sum(dims, keepdim=True) / norm_squared.clamp(min=TINY) * direction


def _rescale_std(prediction: Tensor, pred_cond: Tensor, strength: float) -> Tensor:
    """Rescale to the standard deviation of `pred_cond` (arXiv:2305.08891, eq. 15 and 16)."""
    dims = tuple(range(1, pred_cond.dim()))
    ratio = pred_cond.std(dims, keepdim=True) / prediction.std(dims, keepdim=True)
    return prediction * (1 - strength + strength * ratio)
