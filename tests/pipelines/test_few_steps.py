"""Few-step models, compared with diffusers' pipelines and schedulers on the same weights."""

import pytest
import torch

import ldm
from ldm.loading.variants import VARIANTS
from ldm.model import Defaults
from ldm.runtime.errors import ArgumentError
from loading.lorahelp import build_diffusers_pipeline, build_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}  # of tiny models
TRAILING = {"timestep_spacing": "trailing"}
PROMPT, SIZE = ["a cat"], (32, 32)


def make_noise_function(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator)


def sample_with_diffusers(pipe, scheduler, cond, **options):
    """Sample latents from given text embeddings and initial noise."""
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    pipe.vae_scale_factor = 1  # that of tiny models
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn((1, 4, *SIZE), generator=generator)
    if type(scheduler).__name__ == "EulerDiscreteScheduler":  # as if the image had no variance
        sigma = scheduler.sigmas.max()
        latents = latents * (1 + sigma**2).sqrt() / sigma
    return pipe(
        prompt_embeds=cond.crossattn, latents=latents, height=SIZE[0], width=SIZE[1],
        generator=generator, output_type="latent", **options,
    ).images  # fmt: skip


def sample_latents(model, cond, uncond=None, **options):
    return ldm.sample(
        model, cond, uncond, size=SIZE, noise_source=make_noise_function(3), **options
    )


@pytest.fixture
def distilled_model(diffusers):
    """A tiny model that embeds the guidance scale, and diffusers' pipeline with its weights."""
    torch.manual_seed(0)
    model = build_tiny_model("sd1", time_cond_proj_dim=6)
    model.defaults = VARIANTS["lcm-full"].defaults
    components = build_diffusers_pipeline(model).components
    components |= {"scheduler": diffusers.LCMScheduler(**BETAS), "image_encoder": None}
    pipe = diffusers.LatentConsistencyModelPipeline(**components, requires_safety_checker=False)
    return model, pipe


def test_a_latent_consistency_model_is_sampled_as_by_diffusers(distilled_model):
    model, pipe = distilled_model
    cond, calls = model.condition({"txt": PROMPT}), []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    theirs = sample_with_diffusers(
        pipe, pipe.scheduler, cond, guidance_scale=8.0, num_inference_steps=4
    )
    ours = sample_latents(model, cond)
    error = (ours - theirs).abs().max() / theirs.std()
    assert error < 3e-5  # observed: 3.2e-6
    assert len(calls) == 4
    assert not torch.allclose(ours, sample_latents(model, cond, scale=2.0))


@pytest.mark.parametrize(
    ("name", "scheduler_class", "scheduler_options", "steps", "options"),
    [
        ("lcm", "LCMScheduler", {}, 4, {}),
        ("tcd", "TCDScheduler", {}, 4, {"eta": 0.3}),
        ("hyper-1step", "TCDScheduler", {}, 2, {"eta": 1.0}),
        ("hyper", "DDIMScheduler",
         {**TRAILING, "set_alpha_to_one": True, "clip_sample": False}, 4, {}),
        ("lightning", "EulerDiscreteScheduler", TRAILING, 4, {}),
        ("lightning-x0", "EulerDiscreteScheduler",
         {**TRAILING, "prediction_type": "sample"}, 1, {}),
    ],
)  # fmt: skip
def test_variants_are_sampled_as_by_diffusers(
    diffusers, name, scheduler_class, scheduler_options, steps, options
):
    torch.manual_seed(0)
    model, variant = build_tiny_model("sd1"), VARIANTS[name]
    model.defaults, model.parameterization = variant.defaults, variant.prediction_type or "eps"
    cond = model.condition({"txt": PROMPT})
    pipe = build_diffusers_pipeline(model)
    scheduler = getattr(diffusers, scheduler_class)(**BETAS, **scheduler_options)
    theirs = sample_with_diffusers(
        pipe, scheduler, cond, guidance_scale=1.0, num_inference_steps=steps, **options
    )
    ours = sample_latents(model, cond, steps=steps)
    error = (ours - theirs).abs().max() / theirs.std()
    assert error < 2e-4  # observed: 2.8e-6, of x0 3.4e-5


def test_too_many_steps_or_too_large_a_scale_are_warned_of():
    model = build_tiny_model("sd1")
    model.defaults = VARIANTS["lcm"].defaults
    with pytest.warns(UserWarning, match="4 steps and guidance scale 1: 50 steps and guidance"):
        ldm.txt2img(model, PROMPT, size=(8, 8), steps=50, scale=9, sampler="ddim")
    ldm.txt2img(model, PROMPT, size=(8, 8), steps=2)
    model.defaults = Defaults(steps=2, max_steps=3)
    with pytest.warns(UserWarning, match="is made for 2 steps: 4 steps will make images worse"):
        ldm.txt2img(model, PROMPT, size=(8, 8), steps=4)
    model.defaults = Defaults()
    ldm.txt2img(model, PROMPT, size=(8, 8), steps=17)


def test_a_negative_prompt_that_is_not_read_is_warned_of(distilled_model):
    with pytest.warns(UserWarning, match="does not read a negative prompt") as caught:
        ldm.txt2img(distilled_model[0], PROMPT, negative_prompt="dog", size=(8, 8), steps=1)
    assert caught[0].filename == __file__  # warnings point at the caller of the package


@pytest.mark.parametrize(
    "option", [{"pag": 3.0}, {"guidance_rescale": 0.5}, {"guidance_interval": (0, 1)}]
)
def test_guidance_options_are_refused_if_the_model_embeds_the_scale(distilled_model, option):
    with pytest.raises(ArgumentError, match="embeds the guidance scale: leave it out"):
        ldm.txt2img(distilled_model[0], PROMPT, size=SIZE, **option)
