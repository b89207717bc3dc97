"""Image encoders of CLIP, and noise augmentation of their embeddings."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoderhelp import assert_close, make_options

from goldfile import load_golden
from ldm.conditioning import Conditioner
from ldm.encoders.image import CLIPImage, EmbeddingNoise, ImageEmbedding, OpenCLIPImage, preprocess
from ldm.encoders.towers import quick_gelu
from ldm.loading.config import instantiate, read_yaml
from ldm.loading.legacy import translate_config
from recipe import fill

CONFIGS = Path(__file__).parents[2] / "configs"
VISION = {"image_size": 56, "layers": 2, "width": 32, "head_width": 8, "patch_size": 28}
TEXT = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
ARCH = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
COSINE = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def load_image(golden, case):
    inputs = golden.inputs(case)
    if "image" in inputs:
        return inputs["image"]
    info = golden.info(case)
    size = (info["h"], info["w"]) if "h" in info else map(int, case.split("_")[-1].split("x"))
    return F.interpolate(inputs["small"], tuple(size), mode="bilinear", align_corners=False)


def build_tiny_unclip():
    torch.manual_seed(0)
    noise = EmbeddingNoise(timestep_dim=24, noise_schedule_config=COSINE)
    return ImageEmbedding(clip=OpenCLIPImage(arch=ARCH), noise=noise)


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
def test_preprocessed_images_equal_the_recorded_ones(name, case, blur):
    golden = load_golden(name)
    antialias = golden.info(case).get("antialias", True)
    pixels = preprocess(load_image(golden, case), antialias=antialias, blur=blur)
    expected = golden.outputs(case)
    assert_close(pixels[:, :, ::4, ::4], expected["pre"], 1e-6)
    if "pre_mean" in expected:
        assert_close(pixels.mean(dim=(2, 3)), expected["pre_mean"], 1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 700), (900, 30)])
@pytest.mark.parametrize("blur", ["wide", "narrow"])
def test_a_uniform_image_of_any_size_stays_uniform(size, blur):
    pixels = preprocess(torch.full((1, 3, *size), 0.5), blur=blur)
    assert pixels.shape == (1, 3, 224, 224)
    assert_close(pixels, pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels))


@pytest.mark.parametrize("case", ["img0_96x96", "img1_300x420", "img2_512x512"])
def test_open_clip_embedding_equals_the_recorded_one(case):
    golden = load_golden("image_embedder")
    encoder = OpenCLIPImage(arch=golden.meta["tiny_arch"], blur="narrow")
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    assert_close(encoder.embed(load_image(golden, case)), golden.outputs(case)["emb"])


def test_openai_embedding_equals_the_recorded_one():
    golden = load_golden("image_embedder_openai")
    vision = {"layers": 2, "width": 64, "patch_size": 56}
    text = {"vocab_size": 200, "width": 32, "heads": 1, "layers": 2}
    encoder = CLIPImage(model={"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    manifest = golden.meta["state_dict_manifest"]
    shapes = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes == {name: entry[:-1] for name, entry in manifest.items()}
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    assert_close(encoder.embed(golden.inputs("a")["image"]), golden.outputs("a")["emb"])


@pytest.mark.parametrize("case", ["pre_512", "pre_wide"])
def test_the_config_of_image_variations_resizes_as_its_original(case):
    golden = load_golden("seed_variation")
    spec = read_yaml(CONFIGS / "stable-diffusion" / "v1-image-variation-inference.yaml")
    conditioner = translate_config(spec)["params"]["conditioner"]
    vision = dict(golden.meta["config"]["vision"])
    vision["head_width"] = vision["width"] // vision.pop("heads")
    embed_dim = vision.pop("embed_dim")
    arch = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": TEXT}
    conditioner["params"]["text"]["params"]["model"] = arch
    encoder = instantiate(conditioner).text
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    size = golden.info(case)["size"]
    small = golden.inputs(case)["small"]
    image = F.interpolate(small, size, mode="bilinear", align_corners=False).clamp(-1, 1)
    pixels = preprocess(image, antialias=encoder.antialias, blur=encoder.blur)
    assert_close(pixels[:, :, ::7, ::7], golden.outputs(case)["pixels"], 1e-6)
    assert_close(encoder(image), golden.outputs(case)["token"])


@pytest.mark.parametrize(
    ("name", "antialias"),
    [
        ("ClipImageEmbedder", True), ("FrozenCLIPImageEmbedder", False),
        ("FrozenClipImageEmbedder", False),
    ],
)  # fmt: skip
def test_the_default_of_antialias_depends_on_the_original_class(name, antialias):
    spec = {"target": f"ldm.modules.encoders.modules.{name}", "params": {"model": ARCH}}
    assert instantiate(spec).antialias == antialias


@pytest.mark.slow
def test_full_size_embedding_equals_the_recorded_one():
    golden = load_golden("full_clip_image_vith")
    with torch.device("meta"):
        encoder = OpenCLIPImage(blur="narrow")
    del encoder.model.token_embedding  # not read, and 200 MB
    weights = golden.weights(encoder.state_dict())
    encoder.load_state_dict(weights | {"model.logit_scale": torch.zeros(())}, assign=True)
    image = load_image(golden, "a")
    expected = golden.outputs("a")
    assert_close(preprocess(image, blur="narrow")[:, :, ::8, ::8], expected["pre"], 1e-6)
    with torch.no_grad():
        assert_close(encoder.embed(image), expected["emb"])


@pytest.mark.parametrize("case", ["clip_stats", "clip_nostats"])
def test_noised_embeddings_equal_the_recorded_ones(case):
    golden = load_golden("low_scale_model")
    inputs, expected, draws = golden.inputs(case), golden.outputs(case), golden.draws(case)
    path = "statistics.th" if case == "clip_stats" else None
    noise = EmbeddingNoise(timestep_dim=24, noise_schedule_config=COSINE, clip_stats_path=path)
    if path:
        noise.set_statistics(inputs["data_mean"], inputs["data_std"])
    assert_close(noise.alphas_cumprod, inputs["alphas_cumprod"], 1e-6)
    assert_close(noise.scale(inputs["emb"]), expected["scaled"], 1e-6)
    assert_close(noise.unscale(inputs["emb"]), expected["unscaled"], 1e-6)
    assert_close(noise(inputs["emb"], inputs["noise_level"], draws[0]), expected["adm"], 1e-6)
    level, noised = expected["level_emb_none"], expected["z_none"]
    assert_close(noise(inputs["emb"], draws[1], draws[2]), torch.cat([noised, level], dim=1), 1e-6)


def build_recorded_unclip():
    golden = load_golden("unclip_condition")
    noise = EmbeddingNoise(**golden.meta["noise_aug_config"]["params"])
    encoder = ImageEmbedding(clip=OpenCLIPImage(arch=golden.meta["tiny_arch"]), noise=noise)
    names = {name: name.replace("clip.", "embedder.", 1) for name in encoder.state_dict()}
    state = fill({names[k]: v for k, v in encoder.state_dict().items()}, golden.meta["salt"])
    encoder.load_state_dict({name: state[names[name]] for name in names})
    return golden, encoder


def test_the_vector_in_sampling_equals_the_recorded_one():
    golden, encoder = build_recorded_unclip()
    info = golden.info("uc1_dpm")
    embedding = encoder.embed(golden.inputs("uc1_dpm")["image"]).expand(2, -1)
    vector = encoder.noise(embedding, info["noise_level"], golden.draws("uc1_dpm")[0])
    assert_close(vector * info["weight"], golden.outputs("uc1_dpm")["adm"])


def test_the_vector_in_training_equals_the_recorded_one():
    golden, encoder = build_recorded_unclip()
    batch = {"jpg": golden.inputs("unclip_train")["jpg"].movedim(-1, 1)}
    posterior, *_, is_kept = golden.draws("unclip_train")
    torch.manual_seed(golden.info("unclip_train")["seed"])
    torch.randn(posterior.shape)
    embeddings = encoder.prepare(batch, make_options())["embedding"]
    embeddings = [embedding if keep else encoder.null
                  for embedding, keep in zip(embeddings, is_kept, strict=True)]  # fmt: skip
    assert_close(encoder(embeddings), golden.outputs("unclip_train")["c_adm"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_are_float32_whatever_the_weights(dtype):
    encoder, image = build_tiny_unclip(), torch.rand(1, 3, 56, 56)
    full = encoder.embed(image)
    noised = encoder.noise(full, 3, full)
    half = encoder.to(dtype).embed(image)
    assert half.dtype == torch.float32
    assert_close(half, full, 0.05)
    assert torch.equal(encoder.noise(full, 3, full), noised)  # computed in float64


def test_a_noise_level_of_the_batch_is_used():
    encoder, image = build_tiny_unclip(), torch.rand(2, 3, 56, 56)
    batches = ({"jpg": image, "noise_level": level} for level in (0, 999))
    clean, noisy = (encoder.prepare(batch, make_options())["embedding"] for batch in batches)
    assert_close(clean[:, :24], encoder.embed(image), 0.05)
    assert (noisy[:, :24] - encoder.embed(image)).abs().mean() > 0.3
    assert clean[0, 24:].tolist() == [1.0] * 12 + [0.0] * 12
    assert encoder.prepare({"embedding": clean}, make_options()) == {}


def test_a_missing_image_is_zeros_in_both_slots():
    vector, token = build_tiny_unclip(), CLIPImage(model=ARCH)
    image = torch.rand(3, 56, 56)
    batch = {"embedding": [None, torch.ones(48)], "jpg": [image, None]}
    cond = Conditioner(a=vector, b=token)(batch)
    assert torch.equal(cond.vector, torch.tensor([[0.0], [1.0]]).expand(2, 48))
    assert_close(cond.crossattn[0], token.embed(image[None]))
    assert torch.equal(cond.crossattn[1], torch.zeros(1, 24))


def test_images_of_different_sizes_make_one_batch():
    encoder = build_tiny_unclip()
    large, small = torch.rand(3, 80, 70), torch.rand(3, 20, 30)
    rows = encoder.embed([large, small])
    assert_close(rows, torch.cat([encoder.embed(large[None]), encoder.embed(small[None])]))


def test_an_image_encoder_can_be_trained():
    encoder = CLIPImage(model=ARCH, freeze=False)
    encoder(torch.rand(2, 3, 56, 56)).square().sum().backward()
    assert all(p.grad is not None for p in encoder.model.visual.parameters())
    assert not any(p.requires_grad for p in CLIPImage(model=ARCH).parameters())


def test_the_version_selects_the_activation():
    block = OpenCLIPImage(arch=ARCH, version="openai").model.visual.blocks[0]
    assert block.activation is quick_gelu
    assert OpenCLIPImage(arch=ARCH).model.visual.blocks[0].activation is F.gelu


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OpenCLIPImage(arch="ViT-Z"), "unknown arch `ViT-Z`"),
        (lambda: OpenCLIPImage(arch={"vision_cfg": {"widht": 8}}), "vision_cfg key `widht`"),
        (lambda: CLIPImage(model="RN50"), "unknown arch `RN50`"),
        (lambda: CLIPImage(model=ARCH, blur="kornia"), "unknown blur `kornia`"),
        (lambda: EmbeddingNoise(timestep_dim=8).set_statistics(torch.ones(9), torch.ones(9)),
         "statistics of 9 and 9 values do not fit embeddings of 8 features"),
        (lambda: EmbeddingNoise(clip_stats_path="karlo/stats.th").scale(torch.ones(1, 256)),
         "statistics of CLIP's embeddings, `karlo/stats.th`, are missing"),
        (lambda: EmbeddingNoise()(torch.ones(1, 256), 1000, torch.ones(1, 256)), "0 … 999"),
        (lambda: ImageEmbedding(clip=OpenCLIPImage(arch=ARCH), noise=EmbeddingNoise()),
         "timestep_dim must be 24, the number of features of the embeddings, got 256"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
