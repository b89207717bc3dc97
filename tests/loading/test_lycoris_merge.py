"""LyCORIS files merged by `ldm convert`, compared with lycoris-lora's merge in diffusers."""

import contextlib
import importlib
import io
import warnings
from math import prod

import pytest
import torch
from safetensors.torch import load_file

from ldm.commands.convert import main as convert
from ldm.loading.addons.lora_targets import list_lycoris_targets
from ldm.loading.addons.lora_tools import build_model_for_lora
from ldm.loading.files.checkpoint import write_checkpoint
from loading.tinyfamilies import write_family

RANK = 4


def get_locon_shapes(rows, columns, *kernel):
    ones = [1] * len(kernel)
    return {"lora_up.weight": (rows, RANK, *ones), "lora_down.weight": (RANK, columns, *kernel)}


def get_loha_shapes(rows, columns, *kernel):
    pair = {"a": (rows, RANK), "b": (RANK, columns * prod(kernel))}
    return {f"hada_w{number}_{name}": size for number in (1, 2) for name, size in pair.items()}


def get_lokr_shapes(rows, columns, *kernel):
    return {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, columns // 4, *kernel)}


def get_dora_shapes(rows, columns, *kernel):
    return {**get_locon_shapes(rows, columns, *kernel), "dora_scale": (rows, 1, *[1] * len(kernel))}


def get_ia3_shapes(rows, columns, *kernel):
    return {"weight": (1, rows, 1, 1) if kernel else (rows,), "on_input": ()}


def get_oft_shapes(rows, columns, *kernel):
    return {"oft_blocks": (rows // 4, 4, 4)}


def get_boft_shapes(rows, columns, *kernel):
    """Return shapes with as many blocks and stages as a butterfly of so many rows has."""
    size, count = importlib.import_module("lycoris.modules.boft").butterfly_factor(rows, 4)
    stages = (count - 1).bit_count() + 1
    return {"oft_blocks": (stages, count, size, size), "rescale": (rows, *[1] * (1 + len(kernel)))}


def get_full_shapes(rows, columns, *kernel):
    return {"diff": (rows, columns, *kernel)}


def get_norm_shapes(rows):
    return {"w_norm": (rows,), "b_norm": (rows,)}


ALGORITHMS = {
    "locon": get_locon_shapes, "loha": get_loha_shapes, "lokr": get_lokr_shapes,
    "dora": get_dora_shapes, "ia3": get_ia3_shapes, "oft": get_oft_shapes,
    "boft": get_boft_shapes, "full": get_full_shapes, "norm": get_norm_shapes,
}  # fmt: skip
ALPHAS = {"locon": 2.0, "loha": 4.0, "lokr": 2.0, "dora": 2.0, "oft": 0.001, "boft": 0.001}


class NamedLayers:
    """Layers by their names in files, with the interface that lycoris-lora reads."""

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
    """Get a layer by its name; version 5 of transformers has no `text_model`."""
    component, _, path = name.partition(".")
    prefix = "" if hasattr(networks[component], "text_model") else "text_model."
    return networks[component].get_submodule(path.removeprefix(prefix))


def write_random_file(path, layers, algorithms):
    """Write a file in which layers have the algorithms in turn, and norms have differences."""
    torch.manual_seed(0)
    state, algorithm_by_layer = {}, {}
    matrices_first = sorted(layers.items(), key=lambda item: item[1].weight.dim() == 1)
    for number, (name, layer) in enumerate(matrices_first):
        algorithm = "norm" if layer.weight.dim() == 1 else algorithms[number % len(algorithms)]
        if layer.weight.shape[1:2] == (4,) or len(layer.weight) == 4:  # reads or returns latents
            algorithm = "full"
        if algorithm == "boft" and len(layer.weight).bit_count() > 1:  # has no butterfly
            algorithm = "oft"
        algorithm_by_layer[name] = algorithm
        for role, shape in ALGORITHMS[algorithm](*layer.weight.shape).items():
            state[f"{name}.{role}"] = torch.randn(shape) / 4
        if algorithm in ALPHAS:
            state[f"{name}.alpha"] = torch.tensor(ALPHAS[algorithm])
        if algorithm == "ia3":
            state[f"{name}.on_input"] = torch.tensor(False)
    write_checkpoint(path, state)
    return state, algorithm_by_layer


def merge_with_lycoris(layers, towers, state, strength):
    """Merge with lycoris-lora; (IA)^3 by layer, as its merge of files refuses `on_input`."""
    scaled = [name.removesuffix(".on_input") for name in state if name.endswith(".on_input")]
    vectors = {name: state[f"{name}.weight"] for name in scaled}
    others = {key: value for key, value in state.items() if key.partition(".")[0] not in vectors}
    networks = [NamedLayers(layers, prefix) for prefix in towers]
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("lycoris.utils").merge(
            networks, NamedLayers(layers, "lora_unet"), others, strength
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
def test_convert_merges_all_algorithms_as_lycoris_does(family, strength, towers, tmp_path):
    """Observed error: 1.2e-7. Where its merge differs is left out: it scales LoHa twice (here alpha
    is the rank), and applies strengths to DoRA's magnitude only and to each stage of BOFT."""
    skipped = {"norm"} if strength == 1 else {"norm", "dora", "boft"}
    algorithms = [name for name in ALGORITHMS if name not in skipped]
    base, file = tmp_path / "base.safetensors", tmp_path / "x.safetensors"
    write_family(family, base)
    assert convert([str(base), str(tmp_path / "theirs")]) == 0
    networks = load_diffusers_networks(tmp_path / "theirs", towers.values())
    targets = list_lycoris_targets(build_model_for_lora(file, base))
    names = {layer.kohya_name: layer.diffusers_name for layer in targets}
    layers = {kohya: get_layer(networks, name) for kohya, name in names.items()}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    state, algorithm_by_layer = write_random_file(file, layers, algorithms)
    assert convert([str(base), str(tmp_path / "ours"), "--lora", f"{file}:{strength}"]) == 0
    merge_with_lycoris(layers, towers, state, strength)
    merged = {}
    for component in networks:
        (path,) = (tmp_path / "ours" / component).glob("*.safetensors")
        merged |= {f"{component}.{name}": value for name, value in load_file(path).items()}
    for name, layer in layers.items():
        ours, theirs = merged[f"{names[name]}.weight"], layer.weight.detach()
        assert (theirs - before[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=1e-5, msg=f"{algorithm_by_layer[name]}: {name}"
        )
    for prefix in ("lora_unet_", "lora_te"):
        merged_algorithms = {algorithm_by_layer[name] for name in layers if name.startswith(prefix)}
        assert merged_algorithms == {*algorithms, "norm"}
