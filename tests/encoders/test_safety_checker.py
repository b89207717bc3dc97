"""The safety checker against diffusers' class, recorded and installed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from goldfile import load_golden
from ldm.loading.addons.safety import load_safety_checker
from recipe import fill

DECISIONS = (
    "none", "one_concept", "only_by_special_care", "same_without_special", "round_up",
    "round_down", "special_chain", "all",
)  # fmt: skip


def make_recorded_weights():
    """Make weights under the names of the published file, with thresholds of 0."""
    golden = load_golden("seed_safety_checker")
    manifest = golden.meta["state_dict_manifest"]
    return fill({name: torch.zeros(shape) for name, shape in manifest.items()}, golden.meta["salt"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("checker") / "checker.safetensors"
    save_file(make_recorded_weights(), path)
    return path


@pytest.fixture(scope="module")
def checker(weights):
    return load_safety_checker(weights, heads=2)


def make_image(height, width):
    y, x = np.mgrid[:height, :width]
    image = np.stack([127 * (np.sin(x / 17) + 1), 127 * (np.cos(y / 11) + 1), (x + y) % 256], -1)
    noise = np.random.RandomState(height).randint(-8, 8, (height, width, 3))
    return Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("case", ["pre_square", "pre_landscape", "pre_small"])
def test_pixels_are_the_recorded_ones(checker, case):
    golden = load_golden("seed_safety_checker")
    if inputs := golden.inputs(case):
        image = Image.fromarray(inputs["image"].numpy())
    else:
        image = make_image(*golden.info(case)["size"])
    pixels = checker.preprocess(image)[:, :, ::7, ::7]
    torch.testing.assert_close(pixels, golden.outputs(case)["pixels"], rtol=0, atol=1e-6)


def compute_embeddings(checker):
    small = load_golden("seed_safety_checker").inputs("embed")["small"]
    pixels = F.interpolate(small, (224, 224), mode="bilinear", align_corners=False)
    with torch.no_grad():
        return checker.visual(pixels)


def test_embeddings_are_the_recorded_ones(checker):
    expected = load_golden("seed_safety_checker").outputs("embed")["image_embeds"]
    torch.testing.assert_close(compute_embeddings(checker), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", DECISIONS)
def test_decisions_are_the_recorded_ones_exactly(checker, case):
    golden = load_golden("seed_safety_checker")
    inputs, expected = golden.inputs(case), golden.outputs(case)
    checker.concept_embeds_weights.data = inputs["concept_weights"]
    checker.special_care_embeds_weights.data = inputs["special_weights"]
    verdicts = checker.judge_embeddings(compute_embeddings(checker))
    scores = torch.tensor([verdict.scores for verdict in verdicts])
    assert torch.equal(scores, expected["concept_scores"])
    special_scores = torch.tensor([verdict.special_scores for verdict in verdicts])
    assert torch.equal(special_scores, expected["special_scores"])
    assert [verdict.is_flagged for verdict in verdicts] == expected["flagged"].bool().tolist()
    concepts = {
        "bad": [v.concepts for v in verdicts],
        "special": [v.special_concepts for v in verdicts],
    }
    for name, indices in concepts.items():
        assert [mask.nonzero().flatten().tolist() for mask in expected[name]] == indices


def shorten_names(state):
    """Remove the outer prefix `vision_model.`, as transformers 5 does."""
    return {name.replace("vision_model.", "", 1) if name.startswith("vision") else name: value
            for name, value in state.items()}  # fmt: skip


def save_diffusers_checker(folder):
    """Save diffusers' safety checker with the installed transformers, and return it."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    config = load_golden("seed_safety_checker").meta["config"]
    oracle = StableDiffusionSafetyChecker(CLIPConfig(**config)).eval()
    state = make_recorded_weights()
    if not any(name.startswith("vision_model.vision_model.") for name in oracle.state_dict()):
        state = shorten_names(state)
    oracle.load_state_dict(state)
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        getattr(oracle, name).data = torch.full_like(getattr(oracle, name), 0.05)
    oracle.save_pretrained(folder)
    return oracle


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_verdicts_are_those_of_diffusers(tmp_path):
    """The checker is loaded from a pipeline folder, whose config has the number of heads."""
    oracle = save_diffusers_checker(tmp_path / "safety_checker")
    checker = load_safety_checker(tmp_path)
    images = [make_image(*size) for size in ((224, 300), (64, 64), (256, 90))]
    pixels = torch.cat([checker.preprocess(image) for image in images])
    _, flags = oracle(images=[np.ones((8, 8, 3)) for _ in images], clip_input=pixels)
    verdicts = checker.judge(images)
    assert [verdict.is_flagged for verdict in verdicts] == flags
    with torch.no_grad():
        pooled = oracle.vision_model(pixels)[1]
        embeddings = oracle.visual_projection(pooled)
        torch.testing.assert_close(checker.visual(pixels), embeddings, rtol=0, atol=1e-5)


def test_both_prefixes_and_former_buffers_are_read(checker, tmp_path):
    state, path = make_recorded_weights(), tmp_path / "checker.safetensors"
    positions = {"vision_model.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    for tensors in (shorten_names(state), state | positions):
        save_file(tensors, path)
        loaded = load_safety_checker(path, heads=2)
        assert torch.equal(loaded.visual.proj, checker.visual.proj)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet.lora_down.weight": torch.ones(1, 1)}, "is a LoRA, .* not a safety checker"),
        ({"x": torch.ones(1)}, "is another model, not a safety checker"),
        (
            {"concept_embeds": torch.ones(17, 16)},
            "not a complete safety checker: `vision_model.emb",
        ),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, tensors, message):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_safety_checker(path)
    assert "\n" not in str(caught.value)


def test_a_missing_checker_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(FileNotFoundError, match="no safety checker in"):
            load_safety_checker(path)
