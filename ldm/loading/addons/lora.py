"""LoRA files <-> changes of a model's layers, in the formats of kohya and of diffusers.

    kohya       lora_unet_down_blocks_0_…_to_q.lora_down.weight, .lora_up.weight, .alpha
                lora_te_text_model_encoder_layers_0_mlp_fc1.…
    diffusers   unet.down_blocks.0.….to_q.lora_A.weight (or lora.down.weight), lora_B (lora.up)
                text_encoder.text_model.….mlp.fc1.… (or lora_linear_layer.down.weight)

Both name layers as diffusers does (`loading/diffusers/names.py`); inside, kohya's names are used.
SD 1 and SD 2: linear layers and convolutions (LoCon) of UNet and text tower.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.encoders.text import TextEncoder
from ldm.encoders.towers import FusedAttention
from ldm.loading.diffusers.names import text_layers, unet_layers
from ldm.loading.files.checkpoint import Checkpoint, file_hash, read_checkpoint, write_checkpoint
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRA, LoRALayer, Target, merge_loras

__all__ = ["kohya_name", "load_loras", "lora_targets", "read_lora", "write_lora"]

KEY = re.compile(
    r"(.+?)(?:\.(alpha)|[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.\w+)?\.weight)"
)
ROLES = {"A": "down", "B": "up"}
PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
THIRDS = ("q_proj", "k_proj", "v_proj")
OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "lora_mid": "LoCon in Tucker form",
    "oft_": "OFT",
    ".diff": "full difference",
}
OTHER_MODELS = {
    r"lora_te[12]_|text_encoder_2\.|add_embedding|input_blocks_8_1_transformer_blocks_9": "SDXL",
    r"double_blocks|single_(transformer_)?blocks|^transformer\.|joint_blocks": "Flux or SD 3",
}
WIDTHS: dict[Any, str] = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
METADATA = "lora_adapter_metadata"  # key under which diffusers keeps alpha


def load_loras(model: LatentDiffusion, files: Iterable[tuple[str | Path, float]]) -> None:
    """Merges LoRA files into a model, each with a weight; `provenance` remembers them.

    Raises FileNotFoundError, or ValueError if a file does not fit the model.
    """
    adapters, noted = [], []
    for path, weight in files:
        adapters.append(read_lora(path, model).scale(weight))
        place = Path(path).expanduser().resolve()
        noted.append({"path": str(place), "weight": weight, "hash": file_hash(place)})
    merge_loras(*adapters)
    model.provenance["loras"] = [*model.provenance.get("loras", []), *noted]


def read_lora(path: str | Path, model: LatentDiffusion) -> LoRA:
    """The changes in a file, for the layers of a model; neither attached nor merged.

    Raises FileNotFoundError, or ValueError saying how many names do not fit, and the likely family.
    """
    file = read_checkpoint(path)
    layers = _layers(file)
    known = {kohya_name(name): place for name, place in lora_targets(model).items()}
    _check(layers, known, file, model)
    changes = {}
    for name, tensors in layers.items():
        with torch.device("meta"):
            low = LoRALayer(known[name], len(tensors["down"]))
        shapes = {key: value.shape for key, value in low.state_dict().items()}
        state = {"lora_down.weight": tensors["down"], "lora_up.weight": tensors["up"]}
        state["alpha"] = tensors.get("alpha", torch.tensor(float(low.rank)))
        state = {key: value.reshape(shapes[key]) for key, value in state.items()}
        low.load_state_dict(state, assign=True)
        changes[name] = low.requires_grad_(False)
    return LoRA(changes)


def write_lora(
    adapter: LoRA,
    path: str | Path,
    model: LatentDiffusion,
    style: Literal["kohya", "diffusers"] = "kohya",
    metadata: Mapping[str, str | int] | None = None,
) -> None:
    """Saves the changes; the weight that they are used with is not part of them.

    style: "kohya" opens in A1111, ComfyUI and diffusers. "diffusers" has no alpha in all versions:
        where it is not the rank, `up` is multiplied by their ratio.
    """
    state = {name: value.detach().cpu() for name, value in adapter.state_dict().items()}
    if style == "diffusers":
        titles, kohyas = {kohya_name(name): name for name in lora_targets(model)}, state
        state = {}
        low: Any
        for name, low in adapter.items():
            ratio = float(low.alpha) / low.rank
            down, up = (kohyas[f"{name}.lora_{role}.weight"] for role in ("down", "up"))
            state[f"{titles[name]}.lora_A.weight"] = down
            state[f"{titles[name]}.lora_B.weight"] = up * ratio if ratio != 1 else up
    write_checkpoint(path, state, metadata)


def lora_targets(model: LatentDiffusion) -> dict[str, Target]:
    """Everything that may be changed, by diffusers' name: linear layers and convolutions."""
    found = {}
    for ours, theirs in unet_layers(_layer_names(model.unet)).items():
        found[f"unet.{theirs}"] = Target(model.unet.get_submodule(ours))
    text = model.conditioner.find(TextEncoder)
    if text is not None:
        for ours, theirs in text_layers(_layer_names(text)).items():
            layer = text.get_submodule(ours)
            if ours.startswith(text.unused):
                continue
            if isinstance(layer, FusedAttention):
                for part, third in enumerate(THIRDS):
                    found[f"text_encoder.{theirs}.{third}"] = Target(layer, part)
            else:
                found[f"text_encoder.{theirs}"] = Target(layer)
    return found


def kohya_name(name: str) -> str:
    """Diffusers' name of a layer -> kohya's; also takes the other spellings that files have."""
    if name.startswith("lora_"):
        return name
    name = name.removeprefix("base_model.model.").replace(".processor.to_out", ".to_out.0")
    name = name.replace(".processor.", ".")
    part, _, layer = name.partition(".")
    if part not in PARTS:
        part, layer = "unet", name
    if part == "text_encoder" and not layer.startswith("text_model."):
        layer = f"text_model.{layer}"
    return PARTS[part] + layer.replace(".", "_")


def _layer_names(network: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d, FusedAttention)
    return [name for name, layer in network.named_modules() if isinstance(layer, kinds)]


def _layers(file: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file as {kohya's name: {"down", "up", perhaps "alpha"}}."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, value in file.state.items():
        match = KEY.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        role = match[2] or ROLES.get(match[3], match[3])
        layers.setdefault(kohya_name(match[1]), {})[role] = value
    for sign, kind in OTHER_KINDS.items():
        if any(sign in key for key in others):
            raise ValueError(f"`{file.path}` is a {kind}, only LoRA and LoCon are supported")
    if others or not layers:
        some = ", ".join(f"`{key}`" for key in others[:3])
        raise ValueError(
            f"`{file.path}` is no LoRA: {len(others)} of its {len(file.state)} names are foreign: "
            f"{some}"
        )
    half = [name for name, tensors in layers.items() if not {"down", "up"} <= tensors.keys()]
    if half:
        raise ValueError(f"`{file.path}`: {len(half)} layers lack `down` or `up`: `{half[0]}`")
    for name, alpha in _alphas(file, layers).items():
        layers[name].setdefault("alpha", torch.tensor(float(alpha)))
    return layers


def _alphas(file: Checkpoint, names: Iterable[str]) -> dict[str, float]:
    """What the notes of diffusers or peft say about alpha, by kohya's name."""
    notes: dict[str, Any] = json.loads(file.metadata.get(METADATA, "{}"))
    beside = file.path.with_name("adapter_config.json")
    if not notes and beside.is_file():
        notes = {f"unet.{key}": v for key, v in json.loads(beside.read_text("utf-8")).items()}
    found: dict[str, float] = {}
    for part, prefix in PARTS.items():
        for trait in ("use_dora", "use_rslora"):
            if notes.get(f"{part}.{trait}"):
                raise ValueError(f"`{file.path}`: LoRA with `{trait}` is not supported")
        mine = [name for name in names if name.startswith(prefix)]
        if notes.get(f"{part}.lora_alpha") is not None:
            found |= dict.fromkeys(mine, notes[f"{part}.lora_alpha"])
        for title, alpha in (notes.get(f"{part}.alpha_pattern") or {}).items():
            tail = title.replace(".", "_")
            found |= {name: alpha for name in mine if name.endswith(tail)}
    return found


def _check(
    layers: Mapping[str, Mapping[str, Tensor]],
    known: Mapping[str, Target],
    file: Checkpoint,
    model: LatentDiffusion,
) -> None:
    """Raises ValueError if there is a layer that the model has not, or has in another size."""
    unknown = [name for name in layers if name not in known]
    sizes = []
    for name in layers.keys() & known.keys():
        down, up = layers[name]["down"], layers[name]["up"]
        wanted = known[name].weight.shape
        if _plain((len(up), *down.shape[1:])) != _plain(wanted) or up[0].numel() != len(down):
            sizes.append(f"{name} is {(len(up), *down.shape[1:])} for {tuple(wanted)}")
    if not (unknown or sizes):
        return
    lines = [
        f"`{file.path}` does not fit this model: of its {len(layers)} layers {len(unknown)} are "
        f"unknown, {len(sizes)} of another size: {', '.join([*unknown, *sizes][:3])}"
    ]
    theirs, ours = _family(layers), WIDTHS.get(model.unet.context_dim)
    if theirs:
        lines.append(
            f"hint: it looks made for {theirs}" + (f", the model is {ours}" if ours else "")
        )
    raise ValueError("\n".join(lines))


def _family(layers: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The likely family by names, else by the width of the prompt."""
    for pattern, family in OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in layers):
            return family
    widths = (tensors["down"].shape[1] for name, tensors in layers.items() if "attn2_to_k" in name)
    return WIDTHS.get(next(widths, 0))


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Without a kernel of 1x1, which some files have and others leave out."""
    return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)
