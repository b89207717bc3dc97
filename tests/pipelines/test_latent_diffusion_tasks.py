"""Models of latent-diffusion, as recorded from its scripts and notebooks."""

import copy

import pytest
import torch

import ldm
from goldfile import load_golden
from ldm.encoders.concat_images import MaskedImage
from ldm.loading.weight_names import rename_weights, restore_names
from ldm.pipelines.retrieval import find_neighbors
from ldm.runtime.errors import ArgumentError


def build(golden, name="config", prefix="first_stage_model."):
    """Build a recorded model.

    Args:
        prefix: Name under which the original registered the autoencoder last.
    """
    model = ldm.instantiate(copy.deepcopy(golden.meta[name]))
    state = restore_names(model.state_dict())
    names = {key: key.replace("first_stage_model.", prefix) for key in state}
    weights = golden.weights({names[key]: value for key, value in state.items()})
    model.load_state_dict(rename_weights({key: weights[names[key]] for key in state}))
    return model.eval()


def run(task, model, *args, draws, **options):
    """Run a task with recorded noise; return (latents, images)."""
    noise, latents = iter(draws[1:]), []
    images = task(
        model, *args, x_T=draws[0], seeds=lambda like: next(noise), on_latent=latents.append,
        **options,
    )  # fmt: skip
    return latents[0], images


def test_classes_are_sampled_as_recorded():
    golden, case = load_golden("ldm_class"), "notebook"
    model, info, draws = build(golden), golden.info(case), golden.draws(case)
    results = []
    for k, label in enumerate(info["classes"]):
        class_draws = draws[k * len(draws) // 2 :]
        results.append(run(
            ldm.class2img, model, [label, label], draws=class_draws, scale=info["scale"],
            unconditional_class=info["uc_class"], steps=info["ddim_steps"],
        ))  # fmt: skip
    latents, images = (torch.stack(values) for values in zip(*results, strict=True))
    golden.assert_close(case, latents=latents, images=(images + 1) / 2)


@pytest.mark.parametrize("case", ["ddim_eta1", "kl_churches_like"])
def test_unconditional_models_are_sampled_as_recorded(case):
    golden = load_golden("ldm_uncond")
    info, draws = golden.info(case), golden.draws(case)
    model = build(golden, f"config_{info['config']}")
    model.scale_factor = info.get("scale_factor", 1.0)
    options = {"steps": info["steps"], "eta": info["eta"]}
    latents, images = run(ldm.uncond2img, model, info["batch"], draws=draws, **options)
    recorded = golden.outputs(case)["images"].clamp(-1, 1)
    golden.assert_close(case, latents=latents)
    assert (images - recorded).abs().max() <= 1e-4  # 6e-6 was seen


def test_the_default_eta_of_unconditional_models_is_that_of_their_script():
    golden, case = load_golden("ldm_uncond"), "ddim_eta1"
    model, steps = build(golden, "config_vq"), golden.info(case)["steps"]
    latents, _ = run(ldm.uncond2img, model, 2, draws=golden.draws(case), steps=steps)
    golden.assert_close(case, latents=latents)


@pytest.mark.parametrize("case", ["ddim", "plms"])
def test_texts_are_sampled_as_recorded(case):
    golden = load_golden("ldm_text2img")
    model, draws, recorded = build(golden), golden.draws(case), golden.outputs(case)
    prompts = ["a virus monster, oil on canvas"] * 2
    assert model.defaults.scale == 5
    batches = len(recorded["latents"])
    size, per_batch = (64, 64), len(draws) // batches
    results = [
        run(ldm.txt2img, model, prompts, draws=draws[k * per_batch :], steps=5, sampler=case,
            size=size)[0]
        for k in range(batches)
    ]  # fmt: skip
    golden.assert_close(case, latents=torch.stack(results))


def test_segmentation_maps_are_sampled_as_recorded():
    golden, case = load_golden("ldm_concat"), "semantic"
    model, info, draws = build(golden, "config_semantic"), golden.info(case), golden.draws(case)
    maps = golden.inputs(case)["segmentation"].argmax(-1)[:, None, None]  # (2, 1, 1, H, W)
    options = {"steps": info["steps"], "eta": info["eta"]}
    latents = [
        run(ldm.semantic2img, model, labels, draws=[x[k, None] for x in draws], **options)[0]
        for k, labels in enumerate(maps)
    ]
    golden.assert_close(case, latents=torch.cat(latents))


def test_low_res_images_are_enlarged_as_recorded():
    golden, case = load_golden("ldm_concat"), "sr_plain"
    model, info = build(golden, "config_sr"), golden.info(case)
    image = golden.inputs(case)["lr_uint8"].movedim(-1, 0)[None].float() / 127.5 - 1
    options = {"draws": golden.draws(case), "steps": info["steps"], "eta": info["eta"]}
    latents, images = run(ldm.super_resolve, model, image, **options)
    golden.assert_close(case, latents=latents)
    assert (images - golden.outputs(case)["sample"].clamp(-1, 1)).abs().max() <= 1e-4  # 5e-6 seen


@torch.no_grad()
def test_images_are_inpainted_as_recorded():
    golden, case = load_golden("ldm_concat"), "inpaint_script"
    model = build(golden, "config_inpaint", prefix="cond_stage_model.")
    inputs = golden.inputs(case)
    image = inputs["image_uint8"].movedim(-1, 0)[None].float() / 127.5 - 1
    mask = (inputs["mask_uint8"] / 255.0 >= 0.5).float()[None, None]
    latents, images = run(
        ldm.inpaint, model, [""], image, mask, draws=golden.draws(case), steps=4, eta=0.0
    )
    encoder = model.conditioner.get(MaskedImage)
    cond = encoder.concat_mask(mask, model.encode(encoder.mask_image(image, mask)))
    golden.assert_close(case, latents=latents, cond=cond)
    pixels = ((images[0] + 1) * 127.5).movedim(0, -1)
    # The original truncates to 8 bits.
    assert (pixels - golden.outputs(case)["result_png"]).abs().max() <= 1.01


def test_layouts_are_sampled_as_recorded():
    golden, case = load_golden("ldm_layout"), "e2e"
    model, info = build(golden), golden.info(case)
    tokens, draws = golden.inputs(case)["tokens"], golden.draws(case)
    with torch.no_grad():
        cond = model.condition({"coordinates_bbox": tokens})
    z = ldm.sample(model, cond, x_T=draws[0], steps=info["steps"], eta=info["eta"])
    golden.assert_close(case, c=cond.crossattn, latents=z)
    boxes = [(5, 0.1, 0.2, 0.5, 0.5)]
    assert ldm.layout2img(model, boxes, 2, steps=1, size=(32, 32)).shape == (2, 3, 32, 32)


def test_a_layout_model_of_too_few_tokens_is_refused():
    config = copy.deepcopy(load_golden("ldm_layout").meta["config"])
    config["params"]["cond_stage_config"]["params"]["vocab_size"] = 1024
    with pytest.raises(ArgumentError, match="this has 1024 tokens, boxes need 8192"):
        ldm.layout2img(ldm.instantiate(config), [(5, 0.1, 0.2, 0.5, 0.5)], steps=1)


@pytest.fixture(scope="module")
def class_model():
    return build(load_golden("ldm_class"))


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ([11], {}, "classes of this are 0 … 10, got 11"),
        ([1], {"scale": 3}, "this has no unconditional class: guidance needs unconditional_class"),
        ([1], {"scale": 3, "unconditional_class": 11}, "classes of this are 0 … 10, got 11"),
        ([1], {"unconditional_class": 11}, "classes of this are 0 … 10, got 11"),
        (["cat"], {}, "classes must be a list of whole numbers"),
        ([], {}, "classes must be of at least one image"),
        ([1], {"syntax": "a1111"}, "syntax needs a model that reads prompts"),
        ([1], {"size": (30, 32)}, "multiples of 4, got 30 x 32"),
    ],
)
def test_invalid_arguments_of_class2img_are_refused(class_model, classes, options, message):
    with pytest.raises(ArgumentError, match=message):
        ldm.class2img(class_model, classes, steps=1, **options)


def test_a_class_needs_no_guidance(class_model):
    assert class_model.defaults.scale == 1
    image = ldm.class2img(class_model, [3], steps=1, seeds=1)
    assert torch.equal(image, ldm.class2img(class_model, [3], steps=1, seeds=1, scale=1))
    with pytest.warns(UserWarning, match="unconditional_class has no effect without guidance"):
        ldm.class2img(class_model, [3], steps=1, unconditional_class=10)


def test_an_inpainting_model_without_text_refuses_guidance():
    model = build(load_golden("ldm_concat"), "config_inpaint")
    image, mask = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    with pytest.raises(ArgumentError, match="reads no prompts"):
        ldm.inpaint(model, [""], image, mask, steps=1, scale=7)
    with pytest.warns(UserWarning, match="reads no prompts: ignored"):
        image = ldm.inpaint(model, ["a cat"], image[..., :26], mask[..., :26], steps=1)
    assert image.shape == (1, 3, 32, 26)  # padded to multiples of 8 pixels, and cropped


@pytest.mark.parametrize("n", [0, -1])
def test_at_least_one_image_is_made(n):
    model = build(load_golden("ldm_uncond"), "config_vq")
    with pytest.raises(ArgumentError, match="n must be of at least one image"):
        ldm.uncond2img(model, n, steps=1)


def test_segmentation_maps_are_checked():
    model = build(load_golden("ldm_concat"), "config_semantic")
    for labels, message in (
        (torch.full((1, 1, 32, 32), 7), "classes of this are 0 … 6, got 7"),
        (torch.zeros(1, 1, 30, 32, dtype=torch.int64), "multiples of 4"),
        (torch.zeros(1, 1, 32, 32), "of integers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ldm.semantic2img(model, labels, steps=1)


@pytest.mark.parametrize("case", ["text_only", "neighbours"])
def test_embeddings_and_their_neighbors_are_sampled_as_recorded(case):
    golden = load_golden("ldm_rdm")
    model, shared = build(golden), golden.select("shared/")
    tokens, options = shared["clip_text"][:, None], {"size": (64, 64), "steps": 4}
    if case == "neighbours":
        neighbors = find_neighbors(shared["clip_text"], shared["database_embedding"], 4)
        golden.assert_close(case, nn_embeddings=neighbors)
        tokens = torch.cat([tokens, neighbors], dim=1)
        options |= {"scale": 3.0, "eta": 1.0}
    latents, _ = run(ldm.knn2img, model, tokens, draws=golden.draws(case), **options)
    golden.assert_close(case, latents=latents[None])


def test_embeddings_are_checked():
    model = build(load_golden("ldm_rdm"))
    with pytest.raises(ArgumentError, match=r"embeddings must be tensors \(N, 32\) for each image"):
        ldm.knn2img(model, torch.zeros(2, 1, 16), steps=1)
    with pytest.raises(ArgumentError, match="the database has 3 images, not 4"):
        find_neighbors(torch.ones(1, 8), torch.ones(3, 8), 4)
