"""Guidance methods against their formulas in float64, on a network that is a formula."""

import math

import pytest
import torch

from ldm.conditioning import Composition, Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import (
    Evaluation,
    Guidance,
    PerpNeg,
    PerturbedAttention,
    ProjectedGuidance,
    add_guidance,
)
from ldm.diffusion.names import APG
from ldm.diffusion.schedule import Schedule, make_betas

SCHEDULE = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))
SIGMAS = (9.0, 5.0, 2.0, 0.7)


class Toy:
    """A network that depends on the mean of its condition, which counts half in perturbed rows."""

    def __init__(self, parameterization="eps"):
        self.denoiser = Denoiser(self, SCHEDULE, parameterization)
        self.rows = []

    def __call__(self, z_t, t, context=None, y=None, perturbed=None):
        self.rows.append(len(z_t))
        sigma = SCHEDULE.t_to_sigma(t).float().reshape(-1, 1, 1, 1)
        strength = context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        if perturbed is not None:
            strength = torch.where(perturbed[:, None, None, None], strength / 2, strength)
        eps = 0.7 * z_t.roll(1, -1) + 0.3 * strength * z_t.flip(-2) + 0.01 * strength**2
        if self.denoiser.parameterization == "eps":
            return eps
        std = (1 + sigma**2).sqrt()
        return (z_t / std - (z_t * std - sigma * eps)) * std / sigma


UNCOND, COND, EMPTY = (Cond(torch.full((2, 3, 5), value)) for value in (-1.0, 1.0, 0.2))


def make_noisy(sigma, seed=0):
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) * math.sqrt(1 + sigma**2)


def guide(guidance, *, parameterization="eps", scale=7.5, **options):
    """Compute guided estimates at descending noise levels."""
    denoiser = Toy(parameterization).denoiser
    denoise = add_guidance(denoiser, COND, UNCOND, scale, guidance=guidance, **options)
    return [denoise(make_noisy(sigma), sigma) for sigma in SIGMAS]


def compute_estimates(cond, perturbed=None):
    rows = None if perturbed is None else torch.ones(2, dtype=torch.bool)
    denoiser = Toy().denoiser
    cond = Cond(cond.crossattn, perturbed=rows)
    return [denoiser(make_noisy(sigma), sigma, cond) for sigma in SIGMAS]


APG_NUMBERS = [(0, 15, -0.5), (0.3, 5, 0), (1, 0, 0.4), (1, 15, -0.75)]


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("numbers", APG_NUMBERS)
def test_projected_guidance_equals_its_formula_in_float64(numbers, parameterization):
    """On estimates, sample by sample, with momentum; the largest error is 2e-6 of the largest."""
    eta, norm, momentum = numbers
    ours = guide(ProjectedGuidance(APG(*numbers)), parameterization=parameterization)
    running = [0.0, 0.0]
    for x, *parts in zip(ours, *map(compute_estimates, (COND, UNCOND)), strict=True):
        for row, (cond, uncond) in enumerate(zip(*parts, strict=True)):
            cond, uncond = cond.double().flatten(), uncond.double().flatten()
            running[row] = difference = cond - uncond + momentum * running[row]
            if norm:
                difference = difference * min(1.0, norm / float(difference.norm()))
            along = (difference @ cond) / (cond @ cond) * cond
            formula = cond + 6.5 * (difference - along + eta * along)
            assert (x[row].flatten() - formula).abs().max() < 1e-5 * formula.abs().max()


def test_apg_without_limit_momentum_and_projection_is_classifier_free_guidance():
    settings = APG(1, 1e6, 0)
    for x, plain in zip(guide(ProjectedGuidance(settings)), guide(None), strict=True):
        torch.testing.assert_close(x, plain, rtol=1e-5, atol=1e-4)


def test_perp_neg_equals_its_formula_in_float64():
    """Sample by sample; the largest error is 5e-7 of the largest value."""
    ours = guide(PerpNeg(0.8), extra_conds=[EMPTY])
    for x, *parts in zip(ours, *map(compute_estimates, (COND, UNCOND, EMPTY)), strict=True):
        for row, (cond, negative, empty) in enumerate(zip(*parts, strict=True)):
            cond, negative, empty = (part.double().flatten() for part in (cond, negative, empty))
            positive, negative = cond - empty, negative - empty
            along = (negative @ positive) / (positive @ positive) * positive
            formula = empty + 7.5 * (positive - 0.8 * (negative - along))
            assert (x[row].flatten() - formula).abs().max() < 1e-5 * formula.abs().max()


def test_perturbed_attention_adds_to_any_guidance_before_rescaling():
    toy = Toy().denoiser
    x, sigma = make_noisy(5.0), 5.0
    predictions = [toy.predict(x, sigma, cond) for cond in (UNCOND, COND, EMPTY)]
    rows = torch.ones(2, dtype=torch.bool)
    perturbed = toy.predict(x, sigma, Cond(COND.crossattn, perturbed=rows))
    for guidance, extra_conds in ((ProjectedGuidance(APG()), []), (PerpNeg(1.0), [EMPTY])):
        uncond, cond, *others = predictions[: 2 + len(extra_conds)]
        evaluation = Evaluation(toy, x, sigma, 7.5, uncond, cond, tuple(others))
        prediction = guidance.combine(evaluation) + 3 * (cond - perturbed)
        ratio = cond.std((1, 2, 3), keepdim=True) / prediction.std((1, 2, 3), keepdim=True)
        expected = toy.convert_prediction(x, sigma, prediction * (0.3 + 0.7 * ratio))
        again = type(guidance)(APG()) if isinstance(guidance, ProjectedGuidance) else PerpNeg(1.0)
        guided = add_guidance(
            toy, COND, UNCOND, 7.5, guidance_rescale=0.7, guidance=PerturbedAttention(3.0, again),
            extra_conds=extra_conds,
        )  # fmt: skip
        torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-5, atol=1e-4)


def test_perturbed_attention_acts_on_composed_prompts():
    """The term of each subprompt has its weight."""
    toy, x, sigma = Toy().denoiser, make_noisy(5.0), 5.0
    prompts = COND.cat(EMPTY[:1])
    rows, weights = torch.tensor([0, 1, 1]), torch.tensor([1.0, 1.0, -0.5])
    uncond, cond = toy.predict(x, sigma, UNCOND), toy.predict(x[rows], sigma, prompts)
    perturbed = toy.predict(
        x[rows], sigma, Cond(prompts.crossattn, perturbed=torch.ones(3, dtype=torch.bool))
    )
    terms = 7.5 * (cond - uncond[rows]) + 3 * (cond - perturbed)
    expected = uncond.index_add(0, rows, weights.view(-1, 1, 1, 1) * terms)
    guided = add_guidance(
        toy, Composition(prompts, rows, weights, 2), UNCOND, 7.5,
        guidance=PerturbedAttention(3.0, Guidance()),
    )  # fmt: skip
    expected = toy.convert_prediction(x, sigma, expected)
    torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_perturbed_attention_can_be_combined_with_cfg_pp(scale):
    """Its term is in the guided estimate, but not in the unconditional one."""
    unconds = []
    guidance = PerturbedAttention(3.0, Guidance())
    ours = guide(guidance, scale=scale, on_uncond_denoised=unconds.append)
    parts = map(compute_estimates, (COND, UNCOND), (None, None))
    perturbed = compute_estimates(COND, perturbed=True)
    for x, own_uncond, cond, uncond, without in zip(ours, unconds, *parts, perturbed, strict=True):
        expected = uncond + scale * (cond - uncond) + 3 * (cond - without)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(own_uncond, uncond, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("guidance", "scale", "rows"),
    [
        (None, 7.5, [2, 4, 4, 2]),
        (None, 1.0, [2, 2, 2, 2]),
        (PerturbedAttention(3.0, Guidance()), 7.5, [2, 6, 6, 2]),
        (PerturbedAttention(3.0, Guidance()), 1.0, [2, 4, 4, 2]),
        (PerturbedAttention(3.0, PerpNeg(1.0)), 7.5, [2, 8, 8, 2]),
        (PerturbedAttention(3.0, Guidance()), lambda sigma: 1 + (sigma > 3), [2, 6, 4, 2]),
    ],
)
def test_the_network_computes_only_the_rows_that_are_needed(guidance, scale, rows):
    toy = Toy()
    extra_conds = [EMPTY] * len(guidance.texts if guidance else ())
    denoise = add_guidance(
        toy.denoiser,
        COND,
        UNCOND,
        scale,
        guidance=guidance,
        extra_conds=extra_conds,
        interval=(1.0, 6.0),
    )
    for sigma in SIGMAS:
        denoise(make_noisy(sigma), sigma)
    assert toy.rows == rows


def test_guidance_explains_when_no_noise_level_was_in_its_interval():
    guidance = PerturbedAttention(3.0, ProjectedGuidance(APG()))
    guide(guidance, interval=(20.0, 30.0))
    assert "pag had no effect" in guidance.explain_no_effect()
    guide(guidance)
    assert guidance.explain_no_effect() is None
