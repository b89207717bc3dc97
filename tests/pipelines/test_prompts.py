"""Prompt syntaxes in tasks, from the prompt to the latent."""

import copy

import pytest
import torch

import ldm
from ldm.conditioning import Composition, ScheduledCond
from ldm.diffusion.guidance import add_guidance
from ldm.pipelines.conditions import encode_prompts, encode_scheduled_prompts
from ldm.pipelines.prompts import parse_pair
from ldm.prompts import PromptWarning, parse_prompt
from ldm.runtime.errors import ArgumentError
from loading.lorahelp import build_tiny_model
from nets.nethelp import make_noise
from pipelines.goldmodels import StepRecorder, sample_latents

LONG = "a (red:1.2) apple, on a table, " * 20
OPTIONS = {"steps": 4, "seeds": 1, "size": (16, 16), "scale": 3.0}


@pytest.fixture(scope="module")
def model():
    return build_tiny_model("sd1")


def sample(model, prompts, **options) -> list[torch.Tensor]:
    return sample_latents(model, prompts, **{**OPTIONS, **options})


def encode(model, texts: list[str], steps: int = 4):
    pairs = [parse_pair((text, text), "a1111", steps) for text in texts]
    return encode_scheduled_prompts(pairs, lambda texts, numbers: encode_prompts(model, texts, {}))


IMAGE, LATENT = torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 16, 16)
TEXTS = {
    "sld_concept": lambda model, text: sample(
        model, ["a"], sld="max", sld_concept=text, syntax="a1111")[-1],
    "source_prompt": lambda model, text: ldm.img2img(
        model, ["a"], IMAGE, z=LATENT, inversion=True, source_prompt=text, syntax="a1111",
        steps=4, seeds=1),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_stay_the_same_for_all_steps_are_read_by_the_syntax(model, name):
    run = TEXTS[name]
    assert torch.equal(run(model, "(a cat:1.0)"), run(model, "a cat"))
    assert not torch.equal(run(model, "(a cat:1.4)"), run(model, "a cat"))
    run(model, LONG)  # without a warning, as nothing is truncated
    for text in ("a [cat:dog:0.5]", "a [cat|dog]", "a AND b"):
        with pytest.raises(ArgumentError, match=f"{name} is the same at all steps, it takes no"):
            run(model, text)


@torch.no_grad()
def test_guidance_is_summed_over_subprompts(model):
    cond = encode(model, ["a AND b :0.5 AND c:-1", "d"])
    assert isinstance(cond, Composition)
    assert len(cond) == 2
    x = make_noise(2, 4, 8, 8)
    uncond = model.condition({"txt": ["", ""]})
    predict = model.denoiser.predict

    def predict_alone(text: str) -> torch.Tensor:
        return predict(x[:1], 2.0, model.condition({"txt": [text]}))

    u, a, b, c = map(predict_alone, ("", "a ", "b", "c"))
    expected = u + 3 * (a - u + 0.5 * (b - u) - (c - u))
    composed = add_guidance(model.denoiser, cond, uncond, 3.0)(x, 2.0)
    expected = model.denoiser.convert_prediction(x[:1], 2.0, expected)
    assert torch.allclose(composed[:1], expected, atol=2e-5)
    single = add_guidance(model.denoiser, model.condition({"txt": ["d"]}), uncond[:1], 3.0)
    assert torch.allclose(composed[1:], single(x[1:], 2.0), atol=2e-5)


def test_a_schedule_switches_after_the_step_that_it_names(model):
    """An entry (1, a) is used in steps 0 and 1."""
    for sampler in ("ddim", "heun"):
        constant, scheduled = (
            sample(model, [text], sampler=sampler, syntax="a1111")
            for text in ("a cat", "a [cat:dog:1]")
        )
        assert torch.equal(scheduled[1], constant[1])
        assert not torch.equal(scheduled[2], constant[2])


def test_alternating_words_change_at_each_step(model):
    cond = encode(model, ["[cat|dog] x", "y"])
    assert isinstance(cond, ScheduledCond)
    texts = [
        next(k for k, text in enumerate(("cat x", "dog x"))
             if torch.equal(cond.at(step).crossattn, encode(model, [text, "y"]).crossattn))
        for step in range(6)
    ]  # fmt: skip
    assert texts == [0, 0, 1, 0, 1, 1]


@torch.no_grad()
def test_contexts_of_different_lengths_are_batched_exactly(model):
    """In float64: in float32, the longer shape alone changes 2e-6."""
    cond, uncond = (encode(model, [text]) for text in (LONG, "a pear BREAK sky"))
    assert cond.crossattn.shape[1] == 231
    assert uncond.crossattn.shape[1] == 154
    unet = copy.deepcopy(model.unet).double()
    x, t = torch.randn(2, 4, 8, 8).double(), torch.tensor([500.0, 500.0])
    batched = unet(x, t, context=uncond.cat_samples(cond).crossattn.double())
    singles = [
        unet(x[k : k + 1], t[:1], context=each.crossattn.double())
        for k, each in enumerate((uncond, cond))
    ]
    assert (batched - torch.cat(singles)).abs().max() <= 1e-12


def test_a_batch_has_the_latents_of_its_prompts(model):
    prompts = ["a [cat:dog:2] AND b", LONG, "(sky)"]
    options = {"syntax": "a1111", "negative_prompt": "(x:2)"}
    batch = sample(model, prompts, seeds=[1, 2, 3], **options)[-1]
    for k, prompt in enumerate(prompts):
        single = sample(model, [prompt], seeds=[1 + k], **options)[-1]
        assert torch.allclose(batch[k], single[0], atol=1e-4)


def test_fractions_refer_to_the_steps_that_are_run(model):
    options = {"strength": 0.5, "syntax": "a1111", "seeds": 1, "steps": 8, "scale": 3.0}
    recorders = StepRecorder(), StepRecorder()
    for text, recorder in zip(("a cat", "a [cat:dog:0.5]"), recorders, strict=True):
        ldm.img2img(model, [text], IMAGE, z=LATENT, callback=recorder, **options)
    are_equal = [torch.equal(a, b) for a, b in zip(*(r.xs for r in recorders), strict=True)]
    assert are_equal == [True, True, True, False]


def test_both_text_encoders_of_sdxl_read_the_syntax():
    model = build_tiny_model("sdxl")
    sizes = {"original_size": (64, 64)}
    images = [
        ldm.txt2img(model, ["a (red:1.4) cat"], syntax="a1111", prompt_2=second, **OPTIONS, **sizes)
        for second in (None, "a (red:1.1) cat", LONG)
    ]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_text_without_effect_is_warned_of(model):
    with pytest.warns(PromptWarning, match="longer than 75 tokens: `.* …` is left out"):
        ldm.txt2img(model, [LONG], **OPTIONS)
    with pytest.warns(PromptWarning, match="not a schedule, read as plain text: `\\[a:b:c\\]`"):
        ldm.txt2img(model, ["[a:b:c]"], syntax="a1111", **OPTIONS)


def test_a_second_prompt_needs_as_many_subprompts():
    with pytest.raises(
        ArgumentError, match="AND splits the prompt into 3 subprompts, prompt_2 into 2"
    ):
        parse_pair(("a AND b AND c", "a AND b"), "a1111", 4)


def test_a_batch_entry_may_be_a_parsed_prompt(model):
    prompt = parse_prompt("a (cat:1.2)", "a1111").subprompts[0].at(0)
    cond = model.condition({"txt": [prompt, "a cat", None]})
    assert cond.crossattn.shape == (3, 77, 24)
