"""LyCORIS files merged by `ldm convert`, compared with lycoris-lora's merge in diffusers."""

import contextlib
import importlib
import io
import warnings
from math import prod

import pytest
import torch
from safetensors.torch import load_file
from tinyfamilies import write_family

from ldm.commands.convert import main as convert
from ldm.loading.addons.lora_targets import list_lycoris_targets
from ldm.loading.addons.lora_tools import build_model_for_lora
from ldm.loading.files.checkpoint import write_checkpoint

RANK = 4


def locon(rows, columns, *kernel):
    ones = [1] * len(kernel)
    return {"lora_up.weight": (rows, RANK, *ones), "lora_down.weight": (RANK, columns, *kernel)}


def loha(rows, columns, *kernel):
    pair = {"a": (rows, RANK), "b": (RANK, columns * prod(kernel))}
    return {f"hada_w{number}_{name}": size for number in (1, 2) for name, size in pair.items()}


def lokr(rows, columns, *kernel):
    return {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, columns // 4, *kernel)}


def dora(rows, columns, *kernel):
    return {**locon(rows, columns, *kernel), "dora_scale": (rows, 1, *[1] * len(kernel))}


def ia3(rows, columns, *kernel):
    return {"weight": (1, rows, 1, 1) if kernel else (rows,), "on_input": ()}


def oft(rows, columns, *kernel):
    return {"oft_blocks": (rows // 4, 4, 4)}


def boft(rows, columns, *kernel):
    """As many blocks and stages as its butterfly needs for so many rows."""
    size, count = importlib.import_module("lycoris.modules.boft").butterfly_factor(rows, 4)
    stages = (count - 1).bit_count() + 1
    return {"oft_blocks": (stages, count, size, size), "rescale": (rows, *[1] * (1 + len(kernel)))}


def full(rows, columns, *kernel):
    return {"diff": (rows, columns, *kernel)}


def norm(rows):
    return {"w_norm": (rows,), "b_norm": (rows,)}


KINDS = (locon, loha, lokr, dora, ia3, oft, boft, full)
ALPHAS = {locon: 2.0, loha: 4.0, lokr: 2.0, dora: 2.0, oft: 0.001, boft: 0.001}


class Network:
    """Layers by their names in files, in the form that lycoris-lora reads."""

    def __init__(self, layers, prefix):
        names = [name for name in layers if name.startswith(f"{prefix}_")]
        self.layers = {name.removeprefix(f"{prefix}_"): layers[name] for name in names}

    def named_modules(self):
        return self.layers.items()


def load_diffusers_networks(folder, towers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers
    classes = [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection]
    networks = {"unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")}
    for name, tower in zip(towers, classes, strict=False):
        networks[name] = tower.from_pretrained(folder / name)
    return networks


def get_layer(networks, name):
    """Version 5 of transformers has one level less."""
    component, _, path = name.partition(".")
    is_flat = not hasattr(networks[component], "text_model")
    return networks[component].get_submodule(path.removeprefix("text_model." if is_flat else ""))


def write_random_file(path, layers, kinds):
    """Layers get the kinds in turn; norms get differences."""
    torch.manual_seed(0)
    state, layer_kinds = {}, {}
    matrices_first = sorted(layers.items(), key=lambda item: item[1].weight.dim() == 1)
    for number, (name, layer) in enumerate(matrices_first):
        kind = norm if layer.weight.dim() == 1 else kinds[number % len(kinds)]
        if layer.weight.shape[1:2] == (4,) or len(layer.weight) == 4:  # reads or makes latents
            kind = full
        if kind is boft and len(layer.weight).bit_count() > 1:  # no butterfly
            kind = oft
        layer_kinds[name] = kind
        for role, size in kind(*layer.weight.shape).items():
            state[f"{name}.{role}"] = torch.randn(size) / 4
        if kind in ALPHAS:
            state[f"{name}.alpha"] = torch.tensor(ALPHAS[kind])
        if kind is ia3:
            state[f"{name}.on_input"] = torch.tensor(False)
    write_checkpoint(path, state)
    return state, layer_kinds


def merge_theirs(layers, towers, state, strength):
    """Merge by lycoris-lora; by layer for (IA)^3, whose `on_input` its merge of files refuses."""
    scaled = [name.removesuffix(".on_input") for name in state if name.endswith(".on_input")]
    vectors = {name: state[f"{name}.weight"] for name in scaled}
    rest = {key: value for key, value in state.items() if key.partition(".")[0] not in vectors}
    networks = [Network(layers, prefix) for prefix in towers]
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("lycoris.utils").merge(
            networks, Network(layers, "lora_unet"), rest, strength
        )
    for name, vector in vectors.items():
        module = importlib.import_module("lycoris.modules.ia3").IA3Module(name, layers[name])
        module.weight.data.copy_(vector)
        module.merge_to(strength)


@pytest.mark.parametrize(
    ("family", "strength", "towers"),
    [
        ("xl", 1.0, {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}),
        pytest.param("sd1", 0.7, {"lora_te": "text_encoder"}, marks=pytest.mark.slow),
    ],
)
def test_convert_merges_all_kinds_into_unet_and_towers_as_lycoris_does(
    family, strength, towers, tmp_path
):
    """At most 1.2e-7 apart. What its merge does otherwise is left out: it scales LoHa twice (here
    alpha is the rank); strengths go into DoRA's length alone, and into each stage of BOFT."""
    kinds = [kind for kind in KINDS if kind not in (dora, boft) or strength == 1]
    base, file = tmp_path / "base.safetensors", tmp_path / "x.safetensors"
    write_family(family, base)
    assert convert([str(base), str(tmp_path / "theirs")]) == 0
    networks = load_diffusers_networks(tmp_path / "theirs", towers.values())
    targets = list_lycoris_targets(build_model_for_lora(file, base))
    names = {layer.kohya_name: layer.diffusers_name for layer in targets}
    layers = {kohya: get_layer(networks, name) for kohya, name in names.items()}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    state, layer_kinds = write_random_file(file, layers, kinds)
    assert convert([str(base), str(tmp_path / "ours"), "--lora", f"{file}:{strength}"]) == 0
    merge_theirs(layers, towers, state, strength)
    merged = {}
    for component in networks:
        (path,) = (tmp_path / "ours" / component).glob("*.safetensors")
        merged |= {f"{component}.{name}": value for name, value in load_file(path).items()}
    for name, layer in layers.items():
        ours, theirs = merged[f"{names[name]}.weight"], layer.weight.detach()
        assert (theirs - before[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=1e-5, msg=f"{layer_kinds[name]}: {name}"
        )
    for part in ("lora_unet_", "lora_te"):
        merged_kinds = {layer_kinds[name] for name in layers if name.startswith(part)}
        assert merged_kinds == {*kinds, norm}
