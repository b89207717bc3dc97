"""Safe latent diffusion, compared with recorded runs of diffusers' pipeline on a tiny model."""

import pytest
import torch

from goldfile import load_golden
from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Evaluation, SafeGuidance, add_guidance
from ldm.diffusion.names import SLD, SLD_CONCEPTS, SLD_PRESETS
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.pipelines import txt2img
from nets.nethelp import make_noise
from pipelines.goldmodels import StepRecorder, build_model, sample_latents
from quick import slow_except

SLD_OPTIONS = ("warmup_steps", "guidance_scale", "threshold", "momentum_scale", "mom_beta")
VAE = {
    "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def list_values(parameters):
    return [parameters[f"sld_{name}"] for name in SLD_OPTIONS]


@pytest.fixture(scope="module")
def model():
    golden = load_golden("seed_sld")
    config = golden.meta["config"]
    betas = {name: config[name] for name in ("linear_start", "linear_end")}
    model = build_model(config["unet"], VAE, config["text"], "LatentDiffusion", **betas)
    for component in (model.unet, model.conditioner.text):
        component.load_state_dict(golden.weights(component.state_dict()))
    return model.eval().requires_grad_(False)


def test_presets_and_concepts_equal_the_originals():
    meta = load_golden("seed_sld").meta
    presets = {
        name.lower(): SLD.parse(list_values(preset)) for name, preset in meta["presets"].items()
    }
    assert presets == SLD_PRESETS
    assert {
        name: meta[f"safety_concept_{name}"] for name in ("original", "diffusers")
    } == SLD_CONCEPTS


@pytest.mark.parametrize("size", ["", "_small"])
@pytest.mark.parametrize("preset", SLD_PRESETS)
def test_guided_eps_equals_the_recorded_one_bit_for_bit(preset, size):
    golden, case = load_golden("seed_sld"), f"rule_{preset}{size}"
    info, inputs, expected = golden.case(case)["info"], golden.inputs(case), golden.outputs(case)
    guidance = SafeGuidance(SLD.parse(list_values(info["parameters"])), "")
    denoiser = ToyNetwork("eps").denoiser
    for i in range(info["steps"]):
        uncond, cond, concept = (inputs[f"eps_{name}"][i] for name in ("uncond", "text", "safe"))
        evaluation = Evaluation(
            denoiser, uncond, 3.7, info["guidance_scale"], uncond, cond, (concept,)
        )
        assert torch.equal(guidance.combine(evaluation), expected["guided"][i])
        guidance.num_evaluations += 1


QUICK_CASES = ("traj_negative", "traj_batch2", "traj_unsaturated", "traj_sld1_off")
CASES = (
    *QUICK_CASES, "traj_weak", "traj_medium", "traj_strong", "traj_max", "traj_strong_pndm",
    "traj_concept", "traj_two_per_prompt", "traj_nonsquare_defaults", "traj_scale1_off",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:sld had no effect")
@pytest.mark.parametrize("case", slow_except(CASES, *QUICK_CASES))
def test_runs_equal_the_recorded_ones(model, case):
    """Compare latents after all steps but the last, and the guided eps of the last step."""
    golden, recorder = load_golden("seed_sld"), StepRecorder()
    info, expected = golden.case(case)["info"], golden.outputs(case)
    latents, parameters = golden.inputs(case)["latents"], info["parameters"]
    prompts = [info["prompt"]] if isinstance(info["prompt"], str) else info["prompt"]
    is_pndm = info["scheduler"] == "PNDMScheduler"
    txt2img(
        model,
        prompts * info["num_images_per_prompt"],
        negative_prompt=info["negative_prompt"] or "",
        sld="medium" if isinstance(parameters, str) else list_values(parameters),
        sld_concept=info["safety_concept"],
        scale=info["guidance_scale"],
        steps=info["steps"],
        sampler="plms" if is_pndm else "ddim",
        scheduler="leading",
        x_T=latents,
        size=tuple(8 * side for side in latents.shape[-2:]),
        callback=recorder,
        legacy=["sld-off"],
    )
    noise = golden.case(case)["noise_mkldnn_off_1thread"]
    sigmas = model.schedule.get_step_sigmas(info["steps"], "leading")
    z_ts = expected["x_after"][1:] if is_pndm else expected["x_after"]
    for x, sigma, z_t in zip(recorder.xs[:-1], sigmas[1:], z_ts, strict=False):
        limit = 1e-4 * float(z_ts.abs().max()) + 10 * noise["x_after"]
        assert (x / (1 + sigma**2) ** 0.5 - z_t).abs().max() < limit
    if not is_pndm:  # whose last eps is the mean of four
        eps = (recorder.xs[-2] - recorder.denoised[-1]) / sigmas[-2]
        guided = expected["guided"][-1]
        assert (eps - guided).abs().max() < 1e-4 * guided.abs().max() + 10 * noise["guided"]


class ToyNetwork:
    """A network that predicts the same x0 as eps or as v, and depends on its condition."""

    def __init__(self, parameterization):
        self.schedule = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))
        self.denoiser = Denoiser(self, self.schedule, parameterization)
        self.batch_sizes = []

    def __call__(self, z_t, t, context=None, y=None):
        self.batch_sizes.append(len(z_t))
        sigma = self.schedule.t_to_sigma(t).float().reshape(-1, 1, 1, 1)
        x = z_t * (1 + sigma**2).sqrt()
        eps = 0.7 * z_t.roll(1, -1) + 0.05 * context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) * z_t
        if self.denoiser.parameterization == "eps":
            return eps
        return (x / (1 + sigma**2) - (x - sigma * eps)) * (1 + sigma**2).sqrt() / sigma


CONDS = [Cond(torch.full((2, 3, 5), value)) for value in (0.0, 1.0, 2.0)]
OPTIONS = SLD(2, 20, 0.01, 0.3, 0.4)


def add_sld(denoiser, guidance, **options):
    uncond, cond, concept = CONDS
    return add_guidance(
        denoiser, cond, uncond, 7.5, guidance=guidance, extra_conds=[concept], **options
    )


def test_v_prediction_is_guided_as_eps_prediction_of_the_same_x0():
    x = make_noise(2, 4, 6, 6)
    eps, v = (
        add_sld(ToyNetwork(prediction).denoiser, SafeGuidance(OPTIONS, ""))
        for prediction in ("eps", "v")
    )
    plain = add_guidance(ToyNetwork("v").denoiser, CONDS[1], CONDS[0], 7.5)
    for sigma in (9.0, 5.0, 2.0, 0.7):
        torch.testing.assert_close(v(sigma * x, sigma), eps(sigma * x, sigma), rtol=0, atol=1e-4)
    assert not torch.allclose(v(x, 0.7), plain(x, 0.7), atol=1e-2)


def test_evaluations_outside_the_interval_count_but_run_no_other_conditions():
    toy, guidance = ToyNetwork("eps"), SafeGuidance(OPTIONS, "")
    denoise = add_sld(toy.denoiser, guidance, interval=(1.0, 5.0))
    for sigma in (9.0, 5.0, 0.5):
        denoise(torch.ones(2, 4, 6, 6), sigma)
    assert toy.batch_sizes == [2, 6, 2]
    assert guidance.num_evaluations == 3


def sample_final(model, n, **options):
    """Return the final latents of n images."""
    prompts = ["a cat", "portrait of a samurai warrior"][:n]
    return sample_latents(model, prompts, scale=7.5, **options)[-1]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_every_image_has_a_momentum_of_its_own(model, sampler):
    options = {"sampler": sampler, "sld": [1, 20, 0.1, 0.3, 0.4], "guidance_rescale": 0.5}
    single, pair = (sample_final(model, n, **options) for n in (1, 2))
    torch.testing.assert_close(single, pair[:1], rtol=0, atol=2e-3)
    plain = sample_final(model, 1, sampler=sampler, guidance_rescale=0.5)
    assert (plain - single).abs().max() > 0.05


def test_the_concept_may_be_a_text_or_a_name(model):
    default, original, other = (
        sample_final(model, 1, sld="max", sld_concept=concept)
        for concept in (None, SLD_CONCEPTS["original"], "diffusers")
    )
    assert torch.equal(default, original)
    assert not torch.equal(default, other)


@pytest.mark.slow
def test_sld_guides_tiles_of_the_unet(model):
    sld = [0, 20, 0.1, 0.3, 0.4]
    untiled, one_tile = (sample_final(model, 1, sld=sld, unet_tile=side) for side in (None, 8))
    assert torch.equal(untiled, one_tile)
    tiled, plain = (sample_final(model, 1, sld=value, unet_tile=4) for value in (sld, None))
    assert (tiled - plain).abs().max() > 0.05


def test_a_warmup_as_long_as_the_run_is_warned_of_and_changes_nothing(model):
    with pytest.warns(UserWarning, match="its warmup of 4 is not below the 4 evaluations"):
        idle = sample_final(model, 1, sampler="plms", sld=[4, 20, 0.1, 0.3, 0.4])
    # Not equal, as kernels round differently for three conditions in a batch.
    torch.testing.assert_close(idle, sample_final(model, 1, sampler="plms"), rtol=0, atol=2e-3)
    acting = sample_final(model, 1, sampler="plms", sld=[3, 20, 0.1, 0.3, 0.4])
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
def test_invalid_values_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        sample_final(model, 1, **options)
