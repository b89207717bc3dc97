"""Folders that we write open in diffusers, and both programs make the same images.

Weights are random, so differences of kernels grow: 2e-4 of pixels in [0, 1] is the tolerance, less
than 5e-5 was observed.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from tinyfamilies import PROMPT, WIDTH, change_json

import ldm
from ldm.encoders.image import preprocess
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.diffusers.layout import EXTRA_WEIGHTS
from ldm.loading.weights import open_checkpoint
from ldm.pipelines import sample, vary
from quick import slow_except

pytestmark = pytest.mark.filterwarnings("ignore")  # about the future of other packages

TOLERANCE = 2e-4
STEPS, SCALE, SIDE = 4, 3.0, 32
TEXT = ("sd1", "sd2", "sd2-v")
FAMILIES = (*TEXT, "sd1-inpainting", "inpainting", "depth", "x4", "unclip-l", "unclip-h",
            "variations")  # fmt: skip
OTHERS = ("xl", "xl-refiner", "xl-inpainting", "playground", "cosxl", "ssd-1b", "ldm3d", "ldm3d-4c",
          "ldm3d-sr")  # fmt: skip
OURS = {"steps": STEPS, "scale": SCALE}
XL_SIDE = 64
XL_OURS = OURS | {"sampler": "euler", "scheduler": "leading"}


def open_pipeline(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_xl(folder):
    """With the timestep spacing of published folders, which starts with the same noise as ours."""
    from diffusers import EulerDiscreteScheduler

    pipe = open_pipeline(folder)
    config = {**pipe.scheduler.config, "timestep_spacing": "leading"}
    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    return pipe


def prepare_run(folder, family, batch=1):
    """Diffusers' pipeline, its size, and our options with the noise that both start from."""
    pipe, side, latent, ours = open_pipeline(folder), SIDE, SIDE // 2, OURS
    if family.startswith(("xl", "ssd-1b")):
        pipe, side, latent, ours = open_xl(folder), XL_SIDE, XL_SIDE // 8, XL_OURS
    ours = ours | {"size": (side, side), "x_T": make_noise(batch, 4, latent, latent)}
    return pipe, {"height": side, "width": side}, ours


def make_noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_image(side=SIDE):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def make_options(x):
    x = None if x is None else x.clone()
    return {"latents": x, "num_inference_steps": STEPS, "guidance_scale": SCALE,
            "output_type": "pt", "generator": torch.Generator().manual_seed(5)}  # fmt: skip


def assert_close(ours, theirs, tolerance=TOLERANCE):
    ours = (ours + 1) / 2
    assert ours.std() > 0.05
    assert (ours - theirs).abs().max() < tolerance


@torch.no_grad()
def sample_images(model, batch, x, uncond=None):
    """Sample from given inputs, so that both sides see the same noise."""
    cond = model.condition({"txt": [PROMPT], **batch})
    uncond = model.condition({"txt": [""], **(uncond or batch)})
    z = sample(model, cond, uncond, x_T=x, steps=STEPS, scale=SCALE)
    return model.decode(z).clamp(-1, 1)


SLOW = pytest.mark.slow  # beside the other cases, and the goldens of tests/pipelines


@pytest.mark.parametrize("family", slow_except((*TEXT, "ssd-1b"), "sd2-v"))
def test_text_to_image_equals_diffusers(convert_family, family):
    source, _, folder = convert_family(family)
    pipe, size, ours = prepare_run(folder, family)
    theirs = pipe(PROMPT, **size, **make_options(ours["x_T"])).images
    assert_close(ldm.txt2img(ldm.load(source), [PROMPT], **ours), theirs)
    assert_close(ldm.txt2img(ldm.load(folder), [PROMPT], **ours), theirs)


@SLOW
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_safe_latent_diffusion_equals_diffusers(convert_family, tmp_path, sampler):
    """A folder of that class opens, too; PNDM's first steps are PLMS's."""
    from diffusers import PNDMScheduler
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    source, _, folder = convert_family("sd1")
    parts = {**open_pipeline(folder).components, "safety_checker": None, "image_encoder": None}
    pipe = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
    if sampler == "plms":
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=True)
    x = make_noise(2, 4, 16, 16)
    numbers = {"sld_warmup_steps": 1, "sld_guidance_scale": 20, "sld_threshold": 0.1,
               "sld_momentum_scale": 0.3, "sld_mom_beta": 0.4}  # fmt: skip
    theirs = pipe([PROMPT, "a cat"], negative_prompt=["blurry", ""], height=SIDE, width=SIDE,
                  **numbers, **make_options(x) | {"output_type": "np"}).images  # fmt: skip
    theirs = torch.from_numpy(theirs).movedim(-1, 1)
    pipe.save_pretrained(tmp_path)
    for path in (source, tmp_path):
        ours = ldm.txt2img(
            ldm.load(path), [PROMPT, "a cat"], negative_prompt=["blurry", ""], x_T=x, steps=STEPS,
            size=(SIDE, SIDE), scale=SCALE, sampler=sampler, sld=[*numbers.values()],
            sld_concept="diffusers",
        )  # fmt: skip
        assert_close(ours, theirs)


PAG = {"sd1": "StableDiffusionPAGPipeline", "sd2-v": "StableDiffusionPAGPipeline",
       "xl": "StableDiffusionXLPAGPipeline"}  # fmt: skip


@pytest.mark.parametrize("scale", [SCALE, pytest.param(1.0, marks=SLOW)])
@pytest.mark.parametrize("family", slow_except(PAG, "sd1"))
def test_perturbed_attention_guidance_equals_diffusers(diffusers, convert_family, family, scale):
    """Without classifier-free guidance, too."""
    source, _, folder = convert_family(family)
    pipe, size, ours = prepare_run(folder, family, batch=2)
    pipe = getattr(diffusers, PAG[family])(**pipe.components, pag_applied_layers="mid")
    texts = {"negative_prompt": ["blurry", "a dog"]}
    options = make_options(ours["x_T"]) | {"guidance_scale": scale, "pag_scale": 3.0}
    theirs = pipe([PROMPT, "a cat"], **size, **texts, **options).images
    ours |= {"scale": scale, **texts}
    model = ldm.load(source)
    guided = ldm.txt2img(model, [PROMPT, "a cat"], **ours, pag=3.0)
    assert_close(guided, theirs)
    without = ldm.txt2img(model, [PROMPT, "a cat"], **ours)
    assert (guided - without).abs().max() > 100 * TOLERANCE


@SLOW  # beside the formulas of tests/nets/test_freeu
@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_freeu_by_the_level_of_a_block_equals_diffusers(convert_family, family):
    source, _, folder = convert_family(family)
    pipe, size, ours = prepare_run(folder, family)
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.2, b2=1.4)
    theirs = pipe(PROMPT, **size, **make_options(ours["x_T"])).images
    model, factors = ldm.load(source), {"freeu": (1.2, 1.4, 0.6, 0.4), "freeu_version": "diffusers"}
    assert_close(ldm.txt2img(model, [PROMPT], **ours, **factors), theirs)
    without = ldm.txt2img(model, [PROMPT], **ours)
    assert ((without + 1) / 2 - theirs).abs().max() > 10 * TOLERANCE


@SLOW
@pytest.mark.parametrize("family", ["sd1-inpainting", "inpainting", "xl-inpainting"])
def test_inpainting_equals_diffusers(convert_family, family):
    source, _, folder = convert_family(family)
    pipe, size, ours = prepare_run(folder, family)
    side, _ = ours.pop("size")
    image, mask = make_image(side), torch.zeros(1, 1, side, side)
    mask[..., side // 4 : 3 * side // 4, 8:24] = 1
    inputs = {"image": image, "mask_image": mask, "strength": 1.0}
    theirs = pipe(PROMPT, **inputs, **size, **make_options(ours["x_T"])).images
    ours |= {"seeds": 5, "composite": False}
    assert_close(ldm.inpaint(ldm.load(source), [PROMPT], 2 * image - 1, mask, **ours), theirs)


@SLOW
def test_sdxl_base_and_refiner_equal_diffusers(convert_family):
    base_file, _, base_folder = convert_family("xl")
    refiner_file, _, refiner_folder = convert_family("xl-refiner")
    base, refiner, x = ldm.load(base_file), ldm.load(refiner_file), make_noise(1, 4, 8, 8)
    pipe, sizes = (open_xl(base_folder), {"original_size": (512, 384), "target_size": (96, 80)})
    size = {"height": XL_SIDE, "width": XL_SIDE}
    texts = {"negative_prompt": "blurry", "prompt_2": "a pear"}
    theirs = pipe(PROMPT, **texts, **sizes, **size, **make_options(x)).images
    ours = {**XL_OURS, "size": (XL_SIDE, XL_SIDE), "x_T": x}
    assert_close(ldm.txt2img(base, [PROMPT], **texts, **sizes, **ours), theirs)
    options = {**make_options(x), "output_type": "latent"}
    z_t = pipe(PROMPT, denoising_end=0.5, **size, **options).images
    pipe = open_xl(refiner_folder)
    theirs = pipe(PROMPT, image=z_t, denoising_start=0.5, **make_options(None)).images
    assert_close(ldm.txt2img(base, [PROMPT], refiner=refiner, refiner_start=0.5, **ours), theirs)


@pytest.mark.parametrize("family", slow_except(["sd1", "xl"], "sd1"))
def test_a_folder_whose_network_predicts_x0_equals_diffusers(convert_family, tmp_path, family):
    _, _, written = convert_family(family)
    folder = Path(shutil.copytree(written, tmp_path / family))
    (folder / EXTRA_WEIGHTS).unlink()
    change_json(folder / "scheduler/scheduler_config.json", prediction_type="sample")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*predicts")
        model = ldm.load(folder)
    pipe, size, ours = prepare_run(folder, family)
    theirs = pipe(PROMPT, **size, **make_options(ours["x_T"])).images
    # Guidance multiplies the rounding of the estimate: 2.3e-4 was observed for SDXL.
    assert_close(ldm.txt2img(model, [PROMPT], **ours), theirs, 1e-3)
    convert(plan_conversion(folder, tmp_path / "back"))
    again = json.loads((tmp_path / "back/scheduler/scheduler_config.json").read_text())
    assert again["prediction_type"] == "sample"


@SLOW
def test_depth2img_equals_diffusers(convert_family):
    source, _, folder = convert_family("depth")
    model, image, depth = ldm.load(source), make_image(), make_noise(1, SIDE, SIDE, seed=2)
    pipe = open_pipeline(folder)
    theirs = pipe(PROMPT, image=image, depth_map=depth, strength=1.0, **make_options(None)).images
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        z = model.encode(2 * image - 1, g)
    pipe.scheduler.set_timesteps(STEPS)
    drawn = torch.randn(z.shape, generator=g)
    x = pipe.scheduler.add_noise(z, drawn, pipe.scheduler.timesteps[:1])
    prepared = model.prepare({"depth": depth[None]}, (16, 16))
    assert_close(sample_images(model, {"depth": prepared["depth"]}, x), theirs)
    image_input = make_noise(1, 3, 64, 64)
    with torch.no_grad():
        ours = model.conditioner.depth.run_network(image_input)[:, 0]
        theirs = pipe.depth_estimator(image_input).predicted_depth
    assert ours.std() > 1e-3
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@SLOW
def test_upscaling_equals_diffusers(convert_family):
    source, _, folder = convert_family("x4")
    model, x, image = ldm.load(source), make_noise(1, 4, 16, 16), make_image(16)
    theirs = open_pipeline(folder)(PROMPT, image=image, noise_level=20, **make_options(x)).images
    level, drawn = torch.tensor([20]), make_noise(1, 3, 16, 16, seed=5)
    lowres = model.conditioner.lowres.add_noise(2 * image - 1, level, drawn)
    assert_close(sample_images(model, {"lowres": lowres, "noise_level": level}, x), theirs)


@SLOW
@pytest.mark.parametrize("family", ["unclip-l", "unclip-h"])
def test_unclip_equals_diffusers(convert_family, family):
    source, _, folder = convert_family(family)
    model, x, image_input = ldm.load(source), make_noise(1, 4, 16, 16), make_noise(1, 3, 28, 28)
    pipe = open_pipeline(folder)
    with torch.no_grad():
        embedding = model.conditioner.image.clip.model.visual(image_input)
        assert torch.allclose(pipe.image_encoder(image_input).image_embeds, embedding, atol=1e-5)
        theirs = pipe(prompt=PROMPT, image_embeds=embedding, noise_level=10, height=SIDE,
                      width=SIDE, **make_options(x)).images  # fmt: skip
        vector = model.conditioner.image.noise(embedding, 10, make_noise(1, WIDTH, seed=5))
    assert_close(sample_images(model, {"embedding": vector}, x, {"embedding": [None]}), theirs)


@SLOW
def test_variations_equal_diffusers(convert_family):
    source, _, folder = convert_family("variations")
    pipe, size, ours = prepare_run(folder, "variations")
    image = 2 * make_image() - 1
    image_input = preprocess(image, 28, antialias=False)  # as the original of these models
    theirs = pipe(image=image_input, **size, **make_options(ours["x_T"])).images
    assert_close(vary(ldm.load(source), [""], [image], **ours), theirs)


@pytest.mark.parametrize("family", slow_except((*FAMILIES, *OTHERS), "unclip-l", "xl", "ldm3d-sr"))
def test_a_folder_converts_back_without_loss(convert_family, family):
    _, state, folder = convert_family(family)
    back = open_checkpoint(folder).state
    assert back.keys() == state.keys()
    assert [k for k in state if not torch.equal(state[k], back[k])] == []
    assert open_checkpoint(folder).step == 7


@pytest.mark.parametrize("family", slow_except(FAMILIES, "unclip-l"))
def test_folders_saved_by_diffusers_are_read(convert_family, family, tmp_path):
    """Without our extra weights, in today's names: tensors that both layouts have are equal."""
    _, state, folder = convert_family(family)
    open_pipeline(folder).save_pretrained(tmp_path)
    assert not (tmp_path / EXTRA_WEIGHTS).exists()
    back = open_checkpoint(tmp_path).state
    extra = folder / EXTRA_WEIGHTS
    extra_names = open_checkpoint(extra).state.keys() if extra.exists() else ()
    assert [k for k in state if k not in extra_names and not torch.equal(state[k], back[k])] == []
    assert all(not back[k].any() for k in back if k in extra_names and ".resblocks." in k)
