"""Safe latent diffusion against recorded runs of diffusers' pipeline, on a tiny model."""

import functools

import pytest
import torch

from goldfile import load_golden
from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Evaluation, SafeGuidance, add_guidance
from ldm.diffusion.names import SLD, SLD_CONCEPTS, SLD_PRESETS
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.pipelines import txt2img
from pipelines.goldmodels import build_model

recorded = functools.cache(load_golden)
PARAMETERS = ("warmup_steps", "guidance_scale", "threshold", "momentum_scale", "mom_beta")
VAE = {
    "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def get_numbers(parameters):
    return [parameters[f"sld_{name}"] for name in PARAMETERS]


@pytest.fixture(scope="module")
def model():
    file = recorded("seed_sld")
    config = file.meta["config"]
    betas = {name: config[name] for name in ("linear_start", "linear_end")}
    model = build_model(config["unet"], VAE, config["text"], "LatentDiffusion", **betas)
    for part in (model.unet, model.conditioner.text):
        part.load_state_dict(file.weights(part.state_dict()))
    return model.eval().requires_grad_(False)


def test_presets_and_concepts_are_those_of_the_packages():
    meta = recorded("seed_sld").meta
    presets = {name.lower(): SLD.parse(get_numbers(row)) for name, row in meta["presets"].items()}
    assert presets == SLD_PRESETS
    assert {
        name: meta[f"safety_concept_{name}"] for name in ("original", "diffusers")
    } == SLD_CONCEPTS


@pytest.mark.parametrize("size", ["", "_small"])
@pytest.mark.parametrize("preset", SLD_PRESETS)
def test_the_rule_equals_the_recorded_one_bit_for_bit(preset, size):
    name = f"rule_{preset}{size}"
    file = recorded("seed_sld")
    info, inputs, expected = file.case(name)["info"], file.inputs(name), file.outputs(name)
    guidance = SafeGuidance(SLD.parse(get_numbers(info["parameters"])), "")
    denoiser = ToyNetwork("eps").denoiser
    for i in range(info["steps"]):
        uncond, cond, concept = (inputs[f"eps_{part}"][i] for part in ("uncond", "text", "safe"))
        evaluation = Evaluation(
            denoiser, uncond, 3.7, info["guidance_scale"], uncond, cond, (concept,)
        )
        assert torch.equal(guidance.combine(evaluation), expected["guided"][i])
        guidance.num_evaluations += 1


QUICK = ("traj_negative", "traj_batch2", "traj_unsaturated", "traj_sld1_off")
SLOW = (
    "traj_weak", "traj_medium", "traj_strong", "traj_max", "traj_strong_pndm", "traj_concept",
    "traj_two_per_prompt", "traj_nonsquare_defaults", "traj_scale1_off",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:sld had no effect")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_runs_equal_the_recorded_ones(model, name):
    """Latents after each step but the last, and the guided eps there."""
    file, steps = recorded("seed_sld"), []
    info, expected = file.case(name)["info"], file.outputs(name)
    latents, parameters = file.inputs(name)["latents"], info["parameters"]
    prompts = [info["prompt"]] if isinstance(info["prompt"], str) else info["prompt"]
    is_pndm = info["scheduler"] == "PNDMScheduler"
    txt2img(
        model,
        prompts * info["num_images_per_prompt"],
        negative_prompt=info["negative_prompt"] or "",
        sld="medium" if isinstance(parameters, str) else get_numbers(parameters),
        sld_concept=info["safety_concept"],
        scale=info["guidance_scale"],
        steps=info["steps"],
        sampler="plms" if is_pndm else "ddim",
        scheduler="leading",
        x_T=latents,
        size=tuple(8 * side for side in latents.shape[-2:]),
        callback=lambda step, count, x, denoised: steps.append((x, denoised)),
        legacy=["sld-off"],
    )
    noise = file.case(name)["noise_mkldnn_off_1thread"]
    sigmas = model.schedule.get_step_sigmas(info["steps"], "leading")
    z_ts = expected["x_after"][1:] if is_pndm else expected["x_after"]
    for (x, _), sigma, z_t in zip(steps[:-1], sigmas[1:], z_ts, strict=False):
        limit = 1e-4 * float(z_ts.abs().max()) + 10 * noise["x_after"]
        assert (x / (1 + sigma**2) ** 0.5 - z_t).abs().max() < limit
    if not is_pndm:  # whose last slope is the mean of four
        eps = (steps[-2][0] - steps[-1][1]) / sigmas[-2]
        guided = expected["guided"][-1]
        assert (eps - guided).abs().max() < 1e-4 * guided.abs().max() + 10 * noise["guided"]


class ToyNetwork:
    """A network that predicts eps or v of the same estimate, and depends on its condition."""

    def __init__(self, parameterization):
        self.schedule = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))
        self.denoiser = Denoiser(self, self.schedule, parameterization)
        self.rows = []

    def __call__(self, z_t, t, context=None, y=None):
        self.rows.append(len(z_t))
        sigma = self.schedule.t_to_sigma(t).float().reshape(-1, 1, 1, 1)
        x = z_t * (1 + sigma**2).sqrt()
        eps = 0.7 * z_t.roll(1, -1) + 0.05 * context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) * z_t
        if self.denoiser.parameterization == "eps":
            return eps
        return (x / (1 + sigma**2) - (x - sigma * eps)) * (1 + sigma**2).sqrt() / sigma


CONDS = [Cond(torch.full((2, 3, 5), value)) for value in (0.0, 1.0, 2.0)]
SETTINGS = SLD(2, 20, 0.01, 0.3, 0.4)


def add_sld(denoiser, guidance, **options):
    uncond, cond, concept = CONDS
    return add_guidance(
        denoiser, cond, uncond, 7.5, guidance=guidance, extra_conds=[concept], **options
    )


def test_v_prediction_is_guided_as_the_eps_of_the_same_estimate():
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    eps, v = (add_sld(ToyNetwork(k).denoiser, SafeGuidance(SETTINGS, "")) for k in ("eps", "v"))
    plain = add_guidance(ToyNetwork("v").denoiser, CONDS[1], CONDS[0], 7.5)
    for sigma in (9.0, 5.0, 2.0, 0.7):
        torch.testing.assert_close(v(sigma * x, sigma), eps(sigma * x, sigma), rtol=0, atol=1e-4)
    assert not torch.allclose(v(x, 0.7), plain(x, 0.7), atol=1e-2)


def test_evaluations_outside_the_interval_count_and_take_one_pass():
    toy, guidance = ToyNetwork("eps"), SafeGuidance(SETTINGS, "")
    denoise = add_sld(toy.denoiser, guidance, interval=(1.0, 5.0))
    for sigma in (9.0, 5.0, 0.5):
        denoise(torch.ones(2, 4, 6, 6), sigma)
    assert toy.rows == [2, 6, 2]
    assert guidance.num_evaluations == 3


def sample_latents(model, n, **options):
    """Latents after the last step, of n images."""
    xs = []
    prompts = ["a cat", "portrait of a samurai warrior"][:n]
    steps = {"steps": 3, "scale": 7.5, "seeds": 5, "size": (64, 64), **options}
    txt2img(model, prompts, callback=lambda step, count, x, denoised: xs.append(x), **steps)
    return xs[-1]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_every_image_has_a_momentum_of_its_own(model, sampler):
    options = {"sampler": sampler, "sld": [1, 20, 0.1, 0.3, 0.4], "guidance_rescale": 0.5}
    one, two = (sample_latents(model, n, **options) for n in (1, 2))
    torch.testing.assert_close(one, two[:1], rtol=0, atol=2e-3)
    plain = sample_latents(model, 1, sampler=sampler, guidance_rescale=0.5)
    assert (plain - one).abs().max() > 0.05


def test_the_concept_can_be_named_and_matters(model):
    runs = [sample_latents(model, 1, sld="max", sld_concept=concept)
            for concept in (None, SLD_CONCEPTS["original"], "diffusers")]  # fmt: skip
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.slow
def test_sld_guides_in_tiles_of_the_unet(model):
    guidance = [0, 20, 0.1, 0.3, 0.4]
    whole, one = (sample_latents(model, 1, sld=guidance, unet_tile=side) for side in (None, 8))
    assert torch.equal(whole, one)
    tiled, plain = (sample_latents(model, 1, sld=sld, unet_tile=4) for sld in (guidance, None))
    assert (tiled - plain).abs().max() > 0.05


def test_a_warmup_as_long_as_the_run_is_warned_of_and_changes_nothing(model):
    with pytest.warns(UserWarning, match="its warmup of 4 is not below the 4 evaluations"):
        idle = sample_latents(model, 1, sampler="plms", sld=[4, 20, 0.1, 0.3, 0.4])
    # Not equal: kernels round differently for three parts in a batch.
    torch.testing.assert_close(idle, sample_latents(model, 1, sampler="plms"), rtol=0, atol=2e-3)
    acting = sample_latents(model, 1, sampler="plms", sld=[3, 20, 0.1, 0.3, 0.4])
    assert (idle - acting).abs().max() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sld": "mild"}, "unknown preset of sld `mild`"),
        ({"sld": [1, 2, 3]}, "takes 5 numbers .* got 3"),
        ({"sld": [0.5, 2, 3, 0, 0]}, "warmup 0.5 is not a whole number"),
        ({"sld": [0, 2, 0, 0, 1.5]}, "beta must be in 0 … 1"),
        ({"sld_concept": "a cat"}, "sld_concept needs sld"),
    ],
)
def test_wrong_values_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        sample_latents(model, 1, **options)
