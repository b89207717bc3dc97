import re
from collections import Counter

import pytest
import torch

from goldfile import load_golden
from ldm.conditioning import Cond
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.image import CLIPImage, OpenCLIPImage
from ldm.encoders.text import OpenCLIPText
from ldm.loading.build import meta_device
from ldm.nets.karlo import Prior
from ldm.pipelines.karlo import encode_texts, sample_image_embeddings, sample_normalized_embeddings
from nets.nethelp import KEYS, assert_close, get_shapes

TINY_PRIOR = {"clip_dim": 16, "xf_width": 32, "xf_layers": 2, "xf_heads": 4}
TEXT_CONFIG = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION_CONFIG = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
TINY_CLIP = {"embed_dim": 16, "text_cfg": TEXT_CONFIG, "vision_cfg": VISION_CONFIG}


def load_recorded_prior():
    """Return the golden file, its prior, and conditions: of 2 prompts, then of 2 empty ones."""
    golden = load_golden("karlo_prior")
    options = golden.meta["config"]["model"]["hparams"]
    prior = Prior(**{k: v for k, v in options.items() if k not in Prior.IGNORED_PARAMS})
    prior.load_state_dict(golden.weights(prior.state_dict(), "model."))
    inputs = golden.inputs("transformer")
    tokens = inputs["txt_feat_seq"] * inputs["mask"][..., None]
    cond = Cond(crossattn=tokens, vector=inputs["txt_feat"])
    return golden, prior.eval(), cond


def build_tiny_prior():
    torch.manual_seed(0)
    prior = Prior(**TINY_PRIOR)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior


def test_the_prediction_equals_the_recorded_one():
    golden, prior, cond = load_recorded_prior()
    inputs = golden.inputs("transformer")
    with torch.no_grad():
        x0 = prior(inputs["x"], inputs["timesteps"], cond.crossattn, cond.vector)
    assert_close(x0, golden.outputs("transformer")["out"])


@pytest.mark.parametrize("steps", [5, 25])
def test_samples_equal_the_recorded_ones(steps):
    golden, prior, cond = load_recorded_prior()
    case = f"sample_{steps}"
    # The original draws noise for the unconditional half, too, and never reads it.
    draws = iter([noise[:2] for noise in golden.draws(case)])
    scale = golden.case(case)["info"]["cf_scale"]
    with torch.no_grad():
        x = sample_normalized_embeddings(
            prior, cond[:2], cond[2:], steps=steps, scale=scale, noise_source=lambda _: next(draws)
        )
    inputs = golden.inputs("transformer")
    assert_close(x * inputs["clip_std"] + inputs["clip_mean"], golden.outputs(case)["img_feat"])
    assert next(draws, None) is None


def test_ddim_samples_equal_the_recorded_ones():
    golden, prior, cond = load_recorded_prior()
    schedule = Schedule(make_betas("squaredcos_cap_v2"))
    sigmas = torch.cat([schedule.sigmas[[750, 500, 250, 0]], torch.zeros(1)])
    initial_noise = golden.draws("sample_ddim4")[0][:2]
    with torch.no_grad():
        x = sample_normalized_embeddings(
            prior, cond[:2], cond[2:], sigmas=sigmas, eta=0.0, noise_source=lambda _: initial_noise
        )
    inputs = golden.inputs("transformer")
    expected = golden.outputs("sample_ddim4")["img_feat"]
    assert_close(x * inputs["clip_std"] + inputs["clip_mean"], expected)


def test_full_size_keys_equal_the_published_ones():
    with meta_device():
        prior = Prior()
    names = Counter()
    for key, shape in get_shapes(prior).items():
        name = re.sub(r"\.resblocks\.\d+\.", ".resblocks.*.", f"model.{key}")
        names[f"{name} {'x'.join(map(str, shape))}"] += 1
    published = [line.split(" ", 1) for line in (KEYS / "prior_karlo.txt").read_text().splitlines()]
    assert names == {name: int(count) for count, name in published}
    assert sum(p.numel() for p in prior.parameters()) == 1_022_028_544


def test_padding_is_ignored():
    prior = build_tiny_prior()
    x, y, t = torch.randn(2, 16), torch.randn(2, 16), torch.tensor([3, 700])
    context = torch.randn(2, 77, 16)
    padded = context.clone()
    padded[:, 5:] = 0
    prior.text_enc_proj.bias.data += 1
    with torch.no_grad():
        before = prior(x, t, padded, y)
        prior.positional_embedding.data[:, 5:77] += 1
        after = prior(x, t, padded, y)
        assert not torch.allclose(prior(x, t, context, y), after)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_prediction_has_the_dtype_of_the_input(dtype):
    prior = build_tiny_prior()
    inputs = (torch.randn(1, 16), torch.tensor([3]), torch.randn(1, 77, 16), torch.randn(1, 16))
    with torch.no_grad():
        full, half = prior(*inputs), prior.to(dtype)(*inputs)
    assert half.dtype == torch.float32
    assert_close(half, full, tolerance=0.05)


def test_a_sampled_embedding_is_denormalized_by_the_statistics():
    prior, clip = build_tiny_prior(), CLIPImage(model=TINY_CLIP)
    mean, std = torch.full((16,), 3.0), torch.full((16,), 0.5)
    embeddings = [
        sample_image_embeddings(
            prior,
            clip,
            ["a cat"],
            negative,
            mean=mean,
            std=std,
            steps=4,
            noise_source=torch.ones_like,
        ).detach()
        for negative in ("", "", "a dog")
    ]
    assert embeddings[0].shape == (1, 16)
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])
    normalized = sample_normalized_embeddings(
        prior, encode_texts(clip, ["a cat"]), encode_texts(clip, [""]), steps=4,
        noise_source=torch.ones_like,
    )  # fmt: skip
    assert_close(embeddings[0], normalized * 0.5 + 3)


def test_texts_are_encoded_as_by_the_text_encoder_with_the_same_weights():
    clip, encoder = CLIPImage(model=TINY_CLIP), OpenCLIPText(arch=TINY_CLIP, version="openai")
    state = clip.state_dict()
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    texts = ["a cat", "an astronaut riding a horse"]
    cond = encode_texts(clip, texts)
    lengths = cond.crossattn.ne(0).any(-1).sum(1)
    assert lengths.tolist() == [4, 7]
    expected = encoder.encode(texts)
    for k, length in enumerate(lengths):
        assert_close(cond.crossattn[k, :length], expected[k, :length], tolerance=2e-6)
        vector = expected[k, length - 1] @ clip.model.text_projection
        assert_close(cond.vector[k], vector, tolerance=2e-6)


def test_a_clip_without_text_tower_is_refused():
    with pytest.raises(ValueError, match="the prior needs CLIP's text encoder"):
        encode_texts(OpenCLIPImage(arch=TINY_CLIP), ["a cat"])


def test_too_few_steps_are_refused():
    prior = build_tiny_prior()
    cond = Cond(crossattn=torch.ones(1, 77, 16), vector=torch.ones(1, 16))
    with pytest.raises(ValueError, match="must be in 2 … 1000, got 1"):
        sample_normalized_embeddings(prior, cond, cond, steps=1)
