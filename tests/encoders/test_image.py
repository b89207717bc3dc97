import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from goldfile import gold
from ldm.conditioning import Conditioner, PrepareOptions
from ldm.encoders.image import (
    CLIPImage,
    EmbeddingNoise,
    ImageEmbedding,
    OpenCLIPImage,
    preprocess,
)
from recipe import fill

KEYS = Path(__file__).parents[1] / "data" / "keys"
VISION = {"image_size": 56, "layers": 2, "width": 32, "head_width": 8, "patch_size": 28}
TEXT = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TINY = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
COSINE = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


def picture(golden, case):
    inputs = golden.inputs(case)
    if "image" in inputs:
        return inputs["image"]
    info = golden.case(case)["info"]
    size = (info["h"], info["w"]) if "h" in info else map(int, case.split("_")[-1].split("x"))
    return F.interpolate(inputs["small"], tuple(size), mode="bilinear", align_corners=False)


def options(generator=None):
    return PrepareOptions((8, 8), torch.neg, generator)


def tiny_unclip(**options):
    torch.manual_seed(0)
    noise = EmbeddingNoise(timestep_dim=24, noise_schedule_config=COSINE)
    return ImageEmbedding(clip=OpenCLIPImage(arch=TINY), noise=noise, **options)


@pytest.mark.parametrize(
    ("name", "case", "blur"),
    [
        ("image_embedder", "img0_96x96", "narrow"),
        ("image_embedder", "img0_96x96", "wide"),
        ("image_embedder", "img1_300x420", "narrow"),
        ("image_embedder", "img2_512x512", "narrow"),
        ("image_embedder", "no_antialias_400x240", "narrow"),
        ("image_preprocess_kornia060", "img1_300x420", "wide"),
        ("image_preprocess_kornia060", "img2_512x512", "wide"),
    ],
)
def test_what_clip_sees_equals_the_recorded_pixels(name, case, blur):
    golden = gold(name)
    antialias = golden.case(case)["info"].get("antialias", True)
    seen = preprocess(picture(golden, case), antialias=antialias, blur=blur)
    expected = golden.outputs(case)
    assert_close(seen[:, :, ::4, ::4], expected["pre"], 1e-6)
    if "pre_mean" in expected:
        assert_close(seen.mean(dim=(2, 3)), expected["pre_mean"], 1e-6)


def test_the_blur_of_the_original_is_the_default():
    image = torch.rand(1, 3, 300, 260, generator=torch.Generator().manual_seed(0))
    wide, narrow = (preprocess(image, blur=blur) for blur in ("wide", "narrow"))
    assert torch.equal(preprocess(image), wide)
    assert (wide - narrow).abs().max() > 0.1


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 700), (900, 30)])
@pytest.mark.parametrize("blur", ["wide", "narrow"])
def test_any_size_is_seen_and_one_colour_stays_one(size, blur):
    seen = preprocess(torch.full((1, 3, *size), 0.5), blur=blur)
    assert seen.shape == (1, 3, 224, 224)
    assert_close(seen, seen.mean(dim=(2, 3), keepdim=True).expand_as(seen))


@pytest.mark.parametrize("case", ["img0_96x96", "img1_300x420", "img2_512x512"])
def test_open_clip_embedding_equals_the_recorded_one(case):
    golden = gold("image_embedder")
    encoder = OpenCLIPImage(arch=golden.meta["tiny_arch"], blur="narrow")
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    assert_close(encoder.embed(picture(golden, case)), golden.outputs(case)["emb"])


def test_openai_embedding_equals_the_recorded_one():
    golden = gold("image_embedder_openai")
    vision = {"layers": 2, "width": 64, "patch_size": 56}
    text = {"vocab_size": 200, "width": 32, "heads": 1, "layers": 2}
    encoder = CLIPImage(model={"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    manifest = golden.meta["state_dict_manifest"]
    shapes = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes == {name: entry[:-1] for name, entry in manifest.items()}
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    assert_close(encoder.embed(golden.inputs("a")["image"]), golden.outputs("a")["emb"])


@pytest.mark.slow
def test_full_size_embedding_equals_the_recorded_one():
    golden = gold("full_clip_image_vith")
    with torch.device("meta"):
        encoder = OpenCLIPImage(blur="narrow")
    del encoder.model.token_embedding  # not read, and 200 MB
    weights = golden.weights(encoder.state_dict())
    encoder.load_state_dict(weights | {"model.logit_scale": torch.zeros(())}, assign=True)
    image = picture(golden, "a")
    expected = golden.outputs("a")
    assert_close(preprocess(image, blur="narrow")[:, :, ::8, ::8], expected["pre"], 1e-6)
    with torch.no_grad():
        assert_close(encoder.embed(image), expected["emb"])


@pytest.mark.parametrize("case", ["clip_stats", "clip_nostats"])
def test_noised_embeddings_equal_the_recorded_ones(case):
    golden = gold("low_scale_model")
    given, expected, drawn = golden.inputs(case), golden.outputs(case), golden.rng(case)
    path = "statistics.th" if case == "clip_stats" else None
    noise = EmbeddingNoise(timestep_dim=24, noise_schedule_config=COSINE, clip_stats_path=path)
    if path:
        noise.set_statistics(given["data_mean"], given["data_std"])
    assert_close(noise.alphas_cumprod, given["alphas_cumprod"], 1e-6)
    assert_close(noise.scale(given["emb"]), expected["scaled"], 1e-6)
    assert_close(noise.unscale(given["emb"]), expected["unscaled"], 1e-6)
    assert_close(noise(given["emb"], given["noise_level"], drawn[0]), expected["adm"], 1e-6)
    level, noised = expected["level_emb_none"], expected["z_none"]
    assert_close(noise(given["emb"], drawn[1], drawn[2]), torch.cat([noised, level], dim=1), 1e-6)


def recorded_unclip():
    golden = gold("unclip_condition")
    noise = EmbeddingNoise(**golden.meta["noise_aug_config"]["params"])
    encoder = ImageEmbedding(clip=OpenCLIPImage(arch=golden.meta["tiny_arch"]), noise=noise)
    old = {name: name.replace("clip.", "embedder.", 1) for name in encoder.state_dict()}
    state = fill({old[k]: v for k, v in encoder.state_dict().items()}, golden.meta["salt"])
    encoder.load_state_dict({name: state[old[name]] for name in old})
    return golden, encoder


def test_the_vector_of_a_run_equals_the_recorded_one():
    golden, encoder = recorded_unclip()
    info = golden.case("uc1_dpm")["info"]
    embedding = encoder.embed(golden.inputs("uc1_dpm")["image"]).expand(2, -1)
    vector = encoder.noise(embedding, info["noise_level"], golden.rng("uc1_dpm")[0])
    assert_close(vector * info["weight"], golden.outputs("uc1_dpm")["adm"])


def test_the_vector_in_training_equals_the_recorded_one():
    golden, encoder = recorded_unclip()
    batch = {"jpg": golden.inputs("unclip_train")["jpg"].movedim(-1, 1)}
    posterior, *_, kept = golden.rng("unclip_train")
    torch.manual_seed(golden.case("unclip_train")["info"]["seed"])
    torch.randn(posterior.shape)
    rows = encoder.prepare(batch, options())["embedding"]
    lost = [row if keep else encoder.null for row, keep in zip(rows, kept, strict=True)]
    assert_close(encoder(lost), golden.outputs("unclip_train")["c_adm"])


@pytest.mark.parametrize(
    ("keys", "build", "statistics", "parameters"),
    [
        ("image_unclip_h", OpenCLIPImage, None, 683_800_065),
        ("image_unclip_l", CLIPImage, "ViT-L-14_stats.th", 427_616_513),
    ],
)
def test_full_size_keys_equal_the_published_ones(keys, build, statistics, parameters):
    with torch.device("meta"):
        clip = build()
        noise = EmbeddingNoise(
            timestep_dim=clip.model.visual.proj.shape[1],
            noise_schedule_config=COSINE,
            clip_stats_path=statistics,
        )
        encoder = ImageEmbedding(clip=clip, noise=noise)
    names = Counter()
    for key, value in encoder.state_dict().items():
        key = key.replace("clip.", "embedder.", 1) if key[0] == "c" else f"noise_augmentor{key[5:]}"
        name = re.sub(r"\.resblocks\.\d+\.", ".resblocks.*.", key)
        names[f"{name} {'x'.join(map(str, value.shape))}".rstrip()] += 1
    listed = [line.split(" ", 1) for line in (KEYS / f"{keys}.txt").read_text().splitlines()]
    assert names == {name: int(count) for count, name in listed}
    assert sum(p.numel() for p in encoder.parameters()) == parameters


@pytest.mark.parametrize("quick", [False, True])
def test_embedding_equals_open_clip(quick):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from open_clip.model import CLIPVisionCfg, _build_vision_tower
    theirs = _build_vision_tower(24, CLIPVisionCfg(**VISION), quick_gelu=quick).eval()
    torch.nn.init.normal_(theirs.class_embedding)
    ours = OpenCLIPImage(arch=TINY, version="openai" if quick else "")
    ours.model.visual.load_state_dict(theirs.state_dict())
    image = torch.rand(2, 3, 40, 90) * 2 - 1
    assert_close(ours.embed(image), theirs(preprocess(image, 56)), 2e-6)


def split_state(state, layers):
    """transformers' names and matrices -> OpenAI's."""
    names = [
        (r".*embeddings\.patch_embedding", "conv1"), (r".*pre_layrnorm", "ln_pre"),
        (r".*post_layernorm", "ln_post"), (r".*encoder\.layers", "transformer.resblocks"),
        ("layer_norm", "ln_"), ("self_attn", "attn"), (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"), (r".*token_embedding", "token_embedding"),
        (r".*final_layer_norm", "ln_final"), (r".*class_embedding", "class_embedding"),
        (r".*position_embedding\.weight", "positional_embedding"),
    ]  # fmt: skip
    renamed = {}
    for key, value in state.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for n in range(layers):
        for kind in ("weight", "bias"):
            parts = [f"transformer.resblocks.{n}.attn.{p}_proj.{kind}" for p in "qkv"]
            fused = torch.cat([renamed.pop(part) for part in parts])
            renamed[f"transformer.resblocks.{n}.attn.in_proj_{kind}"] = fused
    return {key: value for key, value in renamed.items() if "position_ids" not in key}


def test_embedding_equals_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=4, image_size=56, patch_size=28,
    )  # fmt: skip
    theirs = CLIPVisionModelWithProjection(config).eval()
    state = split_state(theirs.state_dict(), layers=2)
    state["proj"] = state.pop("visual_projection.weight").T
    ours = CLIPImage(model=TINY)
    ours.model.visual.load_state_dict(state)
    image = torch.rand(2, 3, 56, 56) * 2 - 1
    assert_close(ours.embed(image), theirs(preprocess(image, 56)).image_embeds, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_are_float32_whatever_the_weights(dtype):
    encoder, image = tiny_unclip(), torch.rand(1, 3, 56, 56)
    full, half = encoder.embed(image), encoder.to(dtype).embed(image)
    assert half.dtype == torch.float32
    assert_close(half, full, 0.05)
    assert encoder(encoder.prepare({"jpg": image}, options())["embedding"]).dtype == torch.float32


def test_numbers_of_the_noise_survive_loading_in_half_precision():
    embedding = torch.ones(1, 24)
    noise = EmbeddingNoise(timestep_dim=24, noise_schedule_config=COSINE)
    before = noise(embedding, 3, embedding)
    assert torch.equal(noise.half()(embedding, 3, embedding), before)


def test_noise_comes_from_the_generator():
    encoder, image = tiny_unclip(), torch.rand(2, 3, 56, 56)
    made = [
        encoder.prepare({"jpg": image}, options(torch.Generator().manual_seed(seed)))["embedding"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_noise_level_of_the_batch_is_used():
    encoder, image = tiny_unclip(), torch.rand(2, 3, 56, 56)
    clean, noisy = (
        encoder.prepare({"jpg": image, "noise_level": level}, options())["embedding"]
        for level in (0, 999)
    )
    assert_close(clean[:, :24], encoder.embed(image), 0.05)
    assert (noisy[:, :24] - encoder.embed(image)).abs().mean() > 0.3
    assert clean[0, 24:].tolist() == [1.0] * 12 + [0.0] * 12


def test_a_prepared_batch_stays_as_it_is():
    assert tiny_unclip().prepare({"embedding": torch.zeros(1, 48)}, options()) == {}


def test_no_image_is_zeros_in_both_slots():
    vector, token = tiny_unclip(), CLIPImage(model=TINY)
    image = torch.rand(3, 56, 56)
    cond = Conditioner(a=vector, b=token)(
        {"embedding": [None, torch.ones(48)], "jpg": [image, None]}
    )
    assert torch.equal(cond.vector, torch.tensor([[0.0], [1.0]]).expand(2, 48))
    assert_close(cond.crossattn[0], token.embed(image[None]))
    assert torch.equal(cond.crossattn[1], torch.zeros(1, 24))


def test_pictures_of_different_sizes_make_one_batch():
    encoder = tiny_unclip()
    large, small = torch.rand(3, 80, 70), torch.rand(3, 20, 30)
    rows = encoder.embed([large, small])
    assert_close(rows, torch.cat([encoder.embed(large[None]), encoder.embed(small[None])]))


def test_an_image_encoder_can_be_trained():
    encoder = CLIPImage(model=TINY, freeze=False)
    encoder(torch.rand(2, 3, 56, 56)).square().sum().backward()
    silent = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert not [name for name in silent if ".visual." in name]
    assert not any(p.requires_grad for p in CLIPImage(model=TINY).parameters())


def test_missing_statistics_are_named_when_they_are_needed():
    noise = EmbeddingNoise(timestep_dim=24, clip_stats_path="karlo/ViT-L-14_stats.th")
    with pytest.raises(ValueError, match="statistics of CLIP's embeddings, `karlo/ViT-L-14_stats"):
        noise(torch.zeros(1, 24), 0, torch.zeros(1, 24))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OpenCLIPImage(arch="ViT-Z"), "unknown arch `ViT-Z`"),
        (lambda: OpenCLIPImage(arch={"vision_cfg": {"widht": 8}}), "vision_cfg key `widht`"),
        (lambda: CLIPImage(model="RN50"), "unknown arch `RN50`"),
        (lambda: CLIPImage(model=TINY, blur="kornia"), "unknown blur `kornia`"),
        (lambda: EmbeddingNoise(timestep_dim=8).set_statistics(torch.ones(9), torch.ones(9)),
         "statistics of 9 and 9 values do not fit embeddings of width 8"),
        (lambda: EmbeddingNoise()(torch.ones(1, 256), 1000, torch.ones(1, 256)), "0 … 999"),
        (lambda: ImageEmbedding(clip=OpenCLIPImage(arch=TINY), noise=EmbeddingNoise()),
         "timestep_dim 256 is not the embedding's width 24"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
