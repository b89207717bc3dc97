"""Inception and CLIP with their preprocessing, against other implementations on equal weights."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.encoders.tokenizer import OPEN_CLIP, tokenize
from ldm.encoders.towers import CLIP
from ldm.evaluation.extractors import (
    CLIPScorer,
    InceptionExtractor,
    preprocess_for_clip,
    preprocess_for_inception,
)
from ldm.loading.addons.clip import check_clip, load_clip
from ldm.loading.addons.inception import load_inception
from ldm.loading.diffusers.locations import (
    convert_to_diffusers,
    locate_text_encoder,
    locate_vision_tower,
)
from ldm.nets.inception import Inception
from ldm.runtime.errors import FileFormatError, UnknownName

SIZES = [(80, 100), (123, 57), (56, 56)]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def inception_weights():
    """Random weights of Inception whose features differ, with the 1,008 classes of the file."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    classifier = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    return network.state_dict() | classifier


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inception_agrees_with_torch_fidelity(inception_weights, images, tmp_path):
    """On the same resized input; observed 0."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(inception_weights, tmp_path / "inception.pth")
    oracle = extractor.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "inception.pth"
    )
    image = images[0].resize((299, 299))
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None]
    extractor = InceptionExtractor(load_inception(tmp_path / "inception.pth"), "clean")
    features = extractor.extract_features([image])
    expected = oracle(pixels)[0]
    assert features.shape == (1, 2048)
    assert float((features - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_clean_resize_is_that_of_clean_fid(images):
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    for image in images:
        expected = (torch.from_numpy(resize(np.array(image))).movedim(-1, 0)[None] - 128) / 128
        assert torch.equal(preprocess_for_inception(image, "clean"), expected)


def test_pytorch_fid_resize_is_bilinear_without_antialiasing(images):
    pixels = torch.from_numpy(np.array(images[0])).movedim(-1, 0)[None] / 255
    expected = 2 * torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear") - 1
    assert torch.equal(preprocess_for_inception(images[0], "pytorch-fid"), expected)
    with pytest.raises(UnknownName, match="did you mean `pytorch-fid`"):
        InceptionExtractor(Inception(), "pytorch_fid")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, "an Inception of 1000 classes: FID needs"),
        ({"fc.weight": None}, "not an Inception network: FID needs"),
        ({"Mixed_6a.branch3x3.conv.weight": torch.zeros(1)}, "does not fit Inception"),
    ],
)
def test_files_that_are_not_inception_are_refused(inception_weights, tmp_path, change, message):
    state = {
        name: value for name, value in (inception_weights | change).items() if value is not None
    }
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises((FileFormatError, ValueError), match=message):
        load_inception(tmp_path / "wrong.pth")


VISION = {"image_size": 56, "layers": 2, "width": 128, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


@pytest.fixture(scope="module")
def clip_weights():
    torch.manual_seed(0)
    model = CLIP(TEXT | {"embed_dim": 64}, VISION | {"heads": 2})
    return {name: torch.randn_like(value) / 20 for name, value in model.state_dict().items()}


PROMPTS = ["a red apple", "Two cats &amp; a dog " * 30, "x"]


@pytest.mark.slow  # to import the package
def test_clip_score_agrees_with_open_clip(clip_weights, images, tmp_path):
    """Observed 2e-8 for embeddings of size 0.1; pixels are equal."""
    import open_clip

    sizes = {"vision_cfg": VISION | {"head_width": 64}, "text_cfg": TEXT}
    open_clip_model = open_clip.model.CLIP(embed_dim=64, **sizes).eval().requires_grad_(False)
    open_clip_model.load_state_dict(clip_weights)
    torch.save(clip_weights, tmp_path / "clip.bin")
    scorer = CLIPScorer(load_clip(tmp_path / "clip.bin"))
    transform = open_clip.transform.image_transform(56, is_train=False)
    pixels = torch.stack([transform(image) for image in images])
    assert torch.equal(torch.cat([preprocess_for_clip(image, 56) for image in images]), pixels)
    image_embeddings = open_clip_model.encode_image(pixels)
    text_embeddings = open_clip_model.encode_text(open_clip.SimpleTokenizer()(PROMPTS))
    assert torch.allclose(scorer.embed_images(images), image_embeddings, atol=1e-6)
    assert torch.allclose(scorer.embed_texts(PROMPTS), text_embeddings, atol=1e-6)
    expected = torch.cosine_similarity(image_embeddings, text_embeddings)
    assert torch.allclose(scorer.score(images, PROMPTS).float(), expected, atol=1e-5)


def test_clip_is_read_from_unclip_checkpoints(clip_weights, tmp_path):
    """unCLIP-L contains all of CLIP; in unCLIP-H the text blocks are in the text encoder."""
    state = clip_weights
    vit_l = {f"embedder.model.{name}": value for name, value in state.items()}
    embedder = {name: value for name, value in vit_l.items() if "model.transformer" not in name}
    text = {name: value for name, value in state.items() if not name.startswith("visual.")}
    vit_h = embedder | {f"cond_stage_model.model.{name}": value for name, value in text.items()}
    torch.save(state, tmp_path / "bare.ckpt")
    expected = CLIPScorer(load_clip(tmp_path / "bare.ckpt")).embed_texts(PROMPTS)
    for name, unclip in {"l.ckpt": vit_l, "h.ckpt": vit_h}.items():
        torch.save({"state_dict": unclip}, tmp_path / name)
        assert torch.equal(CLIPScorer(load_clip(tmp_path / name)).embed_texts(PROMPTS), expected)
    torch.save({"state_dict": embedder}, tmp_path / "no-text.ckpt")
    with pytest.raises(FileFormatError, match=re.escape("vision and text tower")):
        check_clip(tmp_path / "no-text.ckpt")


class StateDictModule(torch.nn.Module):
    """A module with the weights of a state dict, to be saved as OpenAI's archives are."""

    def __init__(self, state):
        super().__init__()
        self.layers = ["code", "that is not run"]
        children = {}
        for name, value in state.items():
            child, _, inner_name = name.partition(".")
            if inner_name:
                children.setdefault(child, {})[inner_name] = value
            else:
                self.register_parameter(child, torch.nn.Parameter(value, requires_grad=False))
        for child, inner_state in children.items():
            self.add_module(child, StateDictModule(inner_state))

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")
def test_clip_is_read_from_the_archives_of_openai(clip_weights, tmp_path):
    sizes = {"input_resolution": torch.tensor(56), "context_length": torch.tensor(77)}
    sizes |= {"vocab_size": torch.tensor(49408)}
    module = StateDictModule(clip_weights | sizes).requires_grad_(False)
    torch.jit.script(module).save(tmp_path / "ViT.pt")
    torch.save(clip_weights, tmp_path / "bare.bin")
    clips = [load_clip(tmp_path / name) for name in ("ViT.pt", "bare.bin")]
    states = [clip.state_dict() for clip in clips]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_the_config_of_transformers_selects_the_activation(clip_weights, tmp_path):
    state = {f"model.{name}": value for name, value in clip_weights.items()}
    locations = locate_text_encoder(name for name in state if "visual" not in name)
    converted = convert_to_diffusers(locations | locate_vision_tower(state), state)
    converted["logit_scale"] = clip_weights["logit_scale"]
    converted = {name: value.contiguous() for name, value in converted.items()}
    save_file(converted, tmp_path / "model.safetensors")
    for activation in ("gelu", "quick_gelu"):
        config = {"text_config": {"hidden_act": activation}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        clip = load_clip(tmp_path)
        assert clip.blocks[0].activation.__name__ == activation
    state = clip.state_dict()
    assert all(torch.equal(state[name], value) for name, value in clip_weights.items())


@pytest.mark.slow  # to import the package
@pytest.mark.filterwarnings("ignore")
def test_clip_of_transformers_agrees_with_it(images, tmp_path):
    """A folder, and its file alone; observed 0."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "intermediate_size": 256}
    text = {"hidden_size": 64, "num_attention_heads": 1, "eos_token_id": 49407}
    vision = {"hidden_size": 128, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = transformers.CLIPConfig(
        text_config=sizes | text, vision_config=sizes | vision, projection_dim=512
    )
    torch.manual_seed(0)
    oracle = transformers.CLIPModel(config).eval()
    oracle.save_pretrained(tmp_path / "clip")
    tokens = tokenize(PROMPTS, OPEN_CLIP)
    pixels = torch.cat([preprocess_for_clip(image, 56) for image in images])
    for path in (tmp_path / "clip", tmp_path / "clip/model.safetensors"):
        scorer = CLIPScorer(load_clip(path))
        with torch.inference_mode():
            text = oracle.text_projection(oracle.text_model(tokens).pooler_output)
            image = oracle.visual_projection(oracle.vision_model(pixels).pooler_output)
        assert torch.allclose(scorer.embed_texts(PROMPTS), text, atol=1e-5)
        assert torch.allclose(scorer.embed_images(images), image, atol=1e-5)
