"""Guidance methods against their formulas in float64, on a network of one formula."""

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


class ToyNetwork:
    """Depends on the mean of its condition; in perturbed samples the condition is halved."""

    def __init__(self, parameterization="eps"):
        self.denoiser = Denoiser(self, SCHEDULE, parameterization)
        self.batch_sizes = []

    def __call__(self, z_t, t, context=None, y=None, perturbed=None):
        self.batch_sizes.append(len(z_t))
        sigma = SCHEDULE.t_to_sigma(t).float().reshape(-1, 1, 1, 1)
        c = context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        if perturbed is not None:
            c = torch.where(perturbed[:, None, None, None], c / 2, c)
        eps = 0.7 * z_t.roll(1, -1) + 0.3 * c * z_t.flip(-2) + 0.01 * c**2
        if self.denoiser.parameterization == "eps":
            return eps
        std = (1 + sigma**2).sqrt()
        return (z_t / std - (z_t * std - sigma * eps)) * std / sigma


UNCOND, COND, EMPTY = (Cond(torch.full((2, 3, 5), value)) for value in (-1.0, 1.0, 0.2))


def make_noisy(sigma, seed=0):
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) * math.sqrt(1 + sigma**2)


def guide(guidance, *, parameterization="eps", scale=7.5, **options):
    """Compute the guided denoised latents at `SIGMAS`."""
    denoiser = ToyNetwork(parameterization).denoiser
    denoise = add_guidance(denoiser, COND, UNCOND, scale, guidance=guidance, **options)
    return [denoise(make_noisy(sigma), sigma) for sigma in SIGMAS]


def compute_denoised(cond, *, is_perturbed=False):
    denoiser = ToyNetwork().denoiser
    if is_perturbed:
        cond = Cond(cond.crossattn, perturbed=torch.ones(2, dtype=torch.bool))
    return [denoiser(make_noisy(sigma), sigma, cond) for sigma in SIGMAS]


APG_SETTINGS = [(0, 15, -0.5), (0.3, 5, 0), (1, 0, 0.4), (1, 15, -0.75)]


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("settings", APG_SETTINGS)
def test_projected_guidance_equals_its_formula_in_float64(settings, parameterization):
    """Sample by sample, with momentum; the largest error is 2e-6 of the largest value."""
    eta, norm, momentum = settings
    guided = guide(ProjectedGuidance(APG(*settings)), parameterization=parameterization)
    running = [0.0, 0.0]
    for x, *terms in zip(guided, *map(compute_denoised, (COND, UNCOND)), strict=True):
        for k, (cond, uncond) in enumerate(zip(*terms, strict=True)):
            cond, uncond = cond.double().flatten(), uncond.double().flatten()
            running[k] = difference = cond - uncond + momentum * running[k]
            if norm:
                difference = difference * min(1.0, norm / float(difference.norm()))
            parallel = (difference @ cond) / (cond @ cond) * cond
            expected = cond + 6.5 * (difference - parallel + eta * parallel)
            assert (x[k].flatten() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_apg_without_limit_momentum_and_projection_is_classifier_free_guidance():
    settings = APG(1, 1e6, 0)
    for x, plain in zip(guide(ProjectedGuidance(settings)), guide(None), strict=True):
        torch.testing.assert_close(x, plain, rtol=1e-5, atol=1e-4)


def test_perp_neg_equals_its_formula_in_float64():
    """Sample by sample; the largest error is 5e-7 of the largest value."""
    guided = guide(PerpNeg(0.8), extra_conds=[EMPTY])
    for x, *terms in zip(guided, *map(compute_denoised, (COND, UNCOND, EMPTY)), strict=True):
        for k, samples in enumerate(zip(*terms, strict=True)):
            cond, negative, empty = (sample.double().flatten() for sample in samples)
            positive, negative = cond - empty, negative - empty
            parallel = (negative @ positive) / (positive @ positive) * positive
            expected = empty + 7.5 * (positive - 0.8 * (negative - parallel))
            assert (x[k].flatten() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_perturbed_attention_adds_to_any_guidance_before_rescaling():
    denoiser = ToyNetwork().denoiser
    x, sigma = make_noisy(5.0), 5.0
    predictions = [denoiser.predict(x, sigma, cond) for cond in (UNCOND, COND, EMPTY)]
    perturbed_cond = Cond(COND.crossattn, perturbed=torch.ones(2, dtype=torch.bool))
    perturbed = denoiser.predict(x, sigma, perturbed_cond)
    for guidance, extra_conds in ((ProjectedGuidance(APG()), []), (PerpNeg(1.0), [EMPTY])):
        uncond, cond, *others = predictions[: 2 + len(extra_conds)]
        evaluation = Evaluation(denoiser, x, sigma, 7.5, uncond, cond, tuple(others))
        prediction = guidance.combine(evaluation) + 3 * (cond - perturbed)
        ratio = cond.std((1, 2, 3), keepdim=True) / prediction.std((1, 2, 3), keepdim=True)
        expected = denoiser.convert_prediction(x, sigma, prediction * (0.3 + 0.7 * ratio))
        guidance = ProjectedGuidance(APG()) if not extra_conds else PerpNeg(1.0)  # without momentum
        options = {"guidance": PerturbedAttention(3.0, guidance), "extra_conds": extra_conds}
        guided = add_guidance(denoiser, COND, UNCOND, 7.5, guidance_rescale=0.7, **options)
        torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-5, atol=1e-4)


def test_perturbed_attention_acts_on_composed_prompts():
    """PAG's term of each subprompt has the weight of the subprompt."""
    denoiser, x, sigma = ToyNetwork().denoiser, make_noisy(5.0), 5.0
    prompts = COND.cat_samples(EMPTY[:1])
    rows, weights = torch.tensor([0, 1, 1]), torch.tensor([1.0, 1.0, -0.5])
    uncond, cond = denoiser.predict(x, sigma, UNCOND), denoiser.predict(x[rows], sigma, prompts)
    perturbed_cond = Cond(prompts.crossattn, perturbed=torch.ones(3, dtype=torch.bool))
    perturbed = denoiser.predict(x[rows], sigma, perturbed_cond)
    terms = 7.5 * (cond - uncond[rows]) + 3 * (cond - perturbed)
    expected = uncond.index_add(0, rows, weights.view(-1, 1, 1, 1) * terms)
    composition, pag = Composition(prompts, rows, weights, 2), PerturbedAttention(3.0, Guidance())
    guided = add_guidance(denoiser, composition, UNCOND, 7.5, guidance=pag)
    expected = denoiser.convert_prediction(x, sigma, expected)
    torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_perturbed_attention_can_be_combined_with_cfg_pp(scale):
    """Its term is in the guided denoised latent, but not in the unconditional one."""
    guidance, unconds = PerturbedAttention(3.0, Guidance()), []
    guided = guide(guidance, scale=scale, on_uncond_denoised=unconds.append)
    perturbed_denoised = compute_denoised(COND, is_perturbed=True)
    terms = (*map(compute_denoised, (COND, UNCOND)), perturbed_denoised)
    for x, x_uncond, cond, uncond, perturbed in zip(guided, unconds, *terms, strict=True):
        expected = uncond + scale * (cond - uncond) + 3 * (cond - perturbed)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(x_uncond, uncond, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("guidance", "scale", "batch_sizes"),
    [
        (None, 7.5, [2, 4, 4, 2]),
        (None, 1.0, [2, 2, 2, 2]),
        (PerturbedAttention(3.0, Guidance()), 7.5, [2, 6, 6, 2]),
        (PerturbedAttention(3.0, Guidance()), 1.0, [2, 4, 4, 2]),
        (PerturbedAttention(3.0, PerpNeg(1.0)), 7.5, [2, 8, 8, 2]),
        (PerturbedAttention(3.0, Guidance()), lambda sigma: 1 + (sigma > 3), [2, 6, 4, 2]),
    ],
)
def test_the_network_computes_only_the_samples_that_are_needed(guidance, scale, batch_sizes):
    network = ToyNetwork()
    extra_conds = [EMPTY] * len(guidance.texts if guidance else ())
    options = {"guidance": guidance, "extra_conds": extra_conds, "interval": (1.0, 6.0)}
    denoise = add_guidance(network.denoiser, COND, UNCOND, scale, **options)
    for sigma in SIGMAS:
        denoise(make_noisy(sigma), sigma)
    assert network.batch_sizes == batch_sizes


def test_guidance_explains_when_no_noise_level_was_in_its_interval():
    guidance = PerturbedAttention(3.0, ProjectedGuidance(APG()))
    guide(guidance, interval=(20.0, 30.0))
    assert "pag had no effect" in guidance.explain_no_effect()
    guide(guidance)
    assert guidance.explain_no_effect() is None
