"""What A1111's web UI does: build models on meta, convert them to half, replace their methods."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compathelp import attend, make_tiny_config, randomize_zeros
from torch import nn

import ldm.models.diffusion.plms
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[2]
MODULES = [
    "ldm.data.util", "ldm.models.autoencoder", "ldm.models.diffusion.ddim",
    "ldm.models.diffusion.ddpm", "ldm.models.diffusion.plms", "ldm.modules.attention",
    "ldm.modules.diffusionmodules.model", "ldm.modules.diffusionmodules.openaimodel",
    "ldm.modules.diffusionmodules.util", "ldm.modules.distributions.distributions",
    "ldm.modules.ema", "ldm.modules.encoders.modules", "ldm.modules.midas", "ldm.util",
]  # fmt: skip
YAMLS = [
    "v2-inference.yaml", "v2-inference-v.yaml", "v2-inpainting-inference.yaml",
    "v2-midas-inference.yaml", "v2-1-stable-unclip-l-inference.yaml",
    "v2-1-stable-unclip-h-inference.yaml",
]  # fmt: skip
STARTUP_CODE = f"""
import importlib.util, os, sys
for folder in ("repositories/stable-diffusion-stability-ai", ".", ".."):
    if os.path.exists(os.path.join(folder, "ldm/models/diffusion/ddpm.py")):
        break
sys.path.append(os.path.abspath(folder))
for name in {YAMLS}:
    assert os.path.exists(os.path.join(folder, "configs/stable-diffusion", name)), name
for name in {MODULES}:
    assert importlib.util.find_spec(name).loader.__class__.__name__ == "CompatFinder", name
import scripts.extension
assert scripts.extension.__file__.startswith(os.getcwd())
print(folder)
"""


def test_the_checkout_is_found_where_the_web_ui_looks(tmp_path):
    """Its folder `scripts` does not hide that of the web UI."""
    (tmp_path / "repositories").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/extension.py").touch()
    os.symlink(ROOT, tmp_path / "repositories/stable-diffusion-stability-ai")
    command = [sys.executable, "-c", STARTUP_CODE]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "repositories/stable-diffusion-stability-ai"


@pytest.fixture(scope="module")
def config():
    return make_tiny_config()


@pytest.fixture(scope="module")
def state(config):
    torch.manual_seed(0)
    return randomize_zeros(instantiate_from_config(config)).state_dict()


@pytest.fixture(scope="module")
def model(config, state):
    """A model that tests share; those that change its weights use `model_copy`."""
    model = instantiate_from_config(config)
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture
def model_copy(model):
    return copy.deepcopy(model)


def sample(model, steps=2, size=8, **options):
    torch.manual_seed(1)
    c, uc = (model.get_learned_conditioning([prompt]) for prompt in ("a cat", ""))
    samples, _ = DDIMSampler(model).sample(
        S=steps, batch_size=1, shape=[4, size, size], conditioning=c, verbose=False,
        unconditional_guidance_scale=5.0, unconditional_conditioning=uc, eta=0.0, **options,
    )  # fmt: skip
    return samples


def test_a_model_is_built_in_the_context_of_the_meta_device(config, state, model):
    with torch.device("meta"):
        built = instantiate_from_config(config)
    built.load_state_dict(state, assign=True)
    assert torch.equal(sample(built.eval()), sample(model))


def test_a_model_is_built_on_the_meta_device_and_filled(config, state, model, monkeypatch):
    """Constructors and `_load_from_state_dict` of three classes are patched."""
    filled = []
    for cls in (nn.Linear, nn.Conv2d, nn.MultiheadAttention):

        def init(self, *args, old=cls.__init__, device=None, **kwargs):
            old(self, *args, device="meta", **kwargs)

        def load(self, state, prefix, *args, old=cls._load_from_state_dict):
            for name, value in self._parameters.items():
                if value is not None and value.is_meta:
                    empty = torch.zeros_like(value, device="cpu")
                    self._parameters[name] = nn.Parameter(empty, requires_grad=False)
            filled.append(prefix)
            old(self, state, prefix, *args)

        monkeypatch.setattr(cls, "__init__", init)
        monkeypatch.setattr(cls, "_load_from_state_dict", load)
    built = instantiate_from_config(config)
    assert sum(value.is_meta for value in built.state_dict().values()) > 100
    built.load_state_dict(state, strict=False)
    monkeypatch.undo()
    assert len(filled) > 100
    assert not any(value.is_meta for value in (*built.parameters(), *built.buffers()))
    assert torch.equal(sample(built.eval()), sample(model))


def test_a_model_without_its_vae_is_converted_to_half_precision(model_copy, monkeypatch):
    model = model_copy
    expected, alphas_cumprod = sample(model), model.alphas_cumprod
    assert not hasattr(model, "depth_model")
    vae, model.first_stage_model = model.first_stage_model, None
    model.half()
    model.first_stage_model = vae
    model.alphas_cumprod = alphas_cumprod
    assert model.first_stage_model.decoder.conv_in.weight.dtype == torch.float32
    assert model.model.diffusion_model.out[2].weight.dtype == torch.float16
    norm = "ldm.modules.diffusionmodules.util.GroupNorm32.forward"
    calls = replace(monkeypatch, norm, lambda old, self, x: old(self.float(), x))  # for CPUs
    with torch.autocast("cpu", torch.float16):
        out = sample(model)
    assert calls
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert not hasattr(model, "conditioner")  # the web UI recognizes SDXL by this attribute
    assert not hasattr(model.cond_stage_model, "model")  # and SD 2 by this one


class TextEncoderWrapper(nn.Module):
    """Replaces the text encoder, as the class that parses weights in prompts does."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.comma = [k for token, k in wrapped.tokenizer.get_vocab().items() if token == ",</w>"]

    def forward(self, texts):
        tokenizer, transformer = self.wrapped.tokenizer, self.wrapped.transformer
        ids = tokenizer(texts, truncation=False, add_special_tokens=False)["input_ids"]
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        tokens = torch.tensor([([start, *prompt] + 77 * [end])[:77] for prompt in ids])
        outputs = transformer(input_ids=tokens, output_hidden_states=-2)
        return transformer.text_model.final_layer_norm(outputs.hidden_states[-2])


def test_the_text_encoder_is_wrapped(model):
    old = model.cond_stage_model
    before = sample(model)
    model.cond_stage_model = TextEncoderWrapper(old)
    assert model.cond_stage_model.comma == [267]
    assert not torch.equal(sample(model), before)
    model.cond_stage_model = old
    assert torch.equal(sample(model), before)


def replace(monkeypatch, path, function):
    """Replace the attribute at a dotted path, whose longest importable prefix is its module."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(names[:end]))
            break
        except ImportError:
            pass
    for name in names[end:-1]:
        owner = getattr(owner, name)
    old, calls = getattr(owner, names[-1]), []

    def call(*args, **kwargs):
        calls.append(path)
        return function(old, *args, **kwargs)

    monkeypatch.setattr(owner, names[-1], call)
    return calls


@pytest.mark.parametrize(
    "path",
    [
        "ldm.modules.attention.CrossAttention.forward",
        "ldm.models.diffusion.ddpm.LatentDiffusion.apply_model",
        "ldm.models.diffusion.ddpm.LatentDiffusion.decode_first_stage",
        "ldm.models.diffusion.ddpm.LatentDiffusion.encode_first_stage",
        "ldm.models.diffusion.ddpm.LatentDiffusion.get_first_stage_encoding",
        "ldm.models.diffusion.ddim.DDIMSampler.register_buffer",
        "ldm.models.diffusion.plms.PLMSSampler.register_buffer",
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder.forward",
    ],
)
def test_replaced_methods_are_called_on_models_already_built(path, model, monkeypatch):
    """The images stay the same; `test_third_party_networks` replaces layers of networks."""

    def run():
        z = sample(model, steps=1)
        if "plms" in path:
            ldm.models.diffusion.plms.PLMSSampler(model).make_schedule(2, verbose=False)
        image = model.decode_first_stage(z)
        return model.get_first_stage_encoding(model.encode_first_stage(image).mode())

    def call(old, *args, **kwargs):
        function = attend if path.endswith("CrossAttention.forward") else old
        return function(*args, **kwargs)

    before, calls = run(), replace(monkeypatch, path, call)
    after = run()
    assert calls
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


def test_loras_find_their_layers_by_name_and_type(model_copy, monkeypatch):
    model, layers = model_copy, {}
    for network, prefix in (
        (model.model, "diffusion_model"),
        (model.cond_stage_model, "transformer"),
    ):
        for name, layer in network.named_modules():
            key = name.replace(".", "_")
            assert name == "" or name.startswith(prefix)
            layers[key] = layer
            layer.network_layer_name = key
    expected = {
        "diffusion_model_input_blocks_1_1_transformer_blocks_0_attn2_to_k": nn.Linear,
        "diffusion_model_input_blocks_1_1_proj_in": nn.Conv2d,
        "diffusion_model_middle_block_0_in_layers_2": nn.Conv2d,
        "diffusion_model_time_embed_0": nn.Linear,
        "transformer_text_model_encoder_layers_1_self_attn_q_proj": nn.Linear,
        "transformer_text_model_encoder_layers_1_mlp_fc1": nn.Linear,
    }
    assert {key: type(layers[key]) for key in expected} == expected
    before, called, old = sample(model), set(), nn.Linear.forward

    def forward(self, x):
        called.add(self.network_layer_name)
        return 1.01 * old(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    assert not torch.allclose(sample(model), before)
    assert called == {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}


def test_circular_padding_makes_images_tile(model_copy):
    model = model_copy
    for layer in model.modules():
        if type(layer) is nn.Conv2d:
            layer.padding_mode = "circular"
    x, c = torch.randn(1, 4, 16, 16), model.get_learned_conditioning(["a cat"])
    out, rolled = (
        model.apply_model(value, torch.tensor([500]), c) for value in (x, x.roll((8, 4), (2, 3)))
    )
    assert (out.roll((8, 4), (2, 3)) - rolled).abs().max() < 1e-4 * out.abs().max()
