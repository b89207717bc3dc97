"""Read and write LoRA files, in the formats of kohya and of diffusers.

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
from ldm.loading.build import meta_device
from ldm.loading.diffusers.names import text_layers, unet_layers
from ldm.loading.files.checkpoint import Checkpoint, file_hash, read_checkpoint, write_checkpoint
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRA, LoRALayer, Target, merge_loras
from ldm.runtime.errors import FileFormatError, WeightsMismatch

__all__ = ["kohya_name", "load_loras", "lora_targets", "read_lora", "write_lora"]

KEY = re.compile(
    r"(.+?)(?:\.(alpha)|[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.\w+)?\.weight)"
)
ROLES = {"A": "down", "B": "up"}
PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
QKV = ("q_proj", "k_proj", "v_proj")
OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "lora_mid": "LoCon in Tucker form",
    "oft_": "OFT",
    ".diff": "full weight difference",
}
OTHER_MODELS = {
    r"lora_te[12]_|text_encoder_2\.|add_embedding|input_blocks_8_1_transformer_blocks_9": "SDXL",
    r"double_blocks|single_(transformer_)?blocks|^transformer\.|joint_blocks": "Flux or SD 3",
}
# By the width of the tokens that cross-attention reads.
FAMILY_BY_WIDTH: dict[object, str] = {
    768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"
}  # fmt: skip
METADATA = "lora_adapter_metadata"  # key under which diffusers keeps alpha


def load_loras(model: LatentDiffusion, files: Iterable[tuple[str | Path, float]]) -> None:
    """Merge LoRA files into a model, each with a strength; `provenance` records them."""
    loras, provenance = [], []
    for file, strength in files:
        path = Path(file).expanduser().resolve()
        loras.append(read_lora(file, model).scale(strength))
        provenance.append({"path": str(path), "weight": strength, "hash": file_hash(path)})
    merge_loras(*loras)
    if provenance:
        model.provenance["loras"] = [*model.provenance.get("loras", []), *provenance]


def read_lora(path: str | Path, model: LatentDiffusion) -> LoRA:
    """The LoRA in a file, for the layers of a model; neither attached nor merged.

    Raises:
        FileFormatError: it is not a LoRA, or one of an unsupported kind.
        WeightsMismatch: it does not fit; says how many layers, and the likely family.
    """
    file = read_checkpoint(path)
    tensors = _tensors_by_layer(file)
    targets = {kohya_name(name): target for name, target in lora_targets(model).items()}
    _check_layers(tensors, targets, file, model)
    return LoRA({name: _build_layer(targets[name], parts) for name, parts in tensors.items()})


def write_lora(
    lora: LoRA,
    path: str | Path,
    model: LatentDiffusion,
    style: Literal["kohya", "diffusers"] = "kohya",
    metadata: Mapping[str, str | int] | None = None,
) -> None:
    """Write a LoRA file; its strength is not saved.

    Args:
        style: "kohya" opens in A1111, ComfyUI and diffusers. "diffusers" folds alpha / rank into
            `up`, as not every version of diffusers reads alpha.
    """
    state = {name: value.detach().cpu() for name, value in lora.state_dict().items()}
    if style == "diffusers":
        names = {kohya_name(name): name for name in lora_targets(model)}
        state = {}
        for name, layer in lora.layers.items():
            ratio = float(layer.alpha) / layer.rank
            up = layer.lora_up.weight.detach().cpu()
            state[f"{names[name]}.lora_A.weight"] = layer.lora_down.weight.detach().cpu()
            state[f"{names[name]}.lora_B.weight"] = up * ratio if ratio != 1 else up
    write_checkpoint(path, state, metadata)


def lora_targets(model: LatentDiffusion) -> dict[str, Target]:
    """Linear layers and convolutions that a LoRA may change, by diffusers' name."""
    targets = {}
    for ours, theirs in unet_layers(_layer_names(model.unet)).items():
        targets[f"unet.{theirs}"] = Target(model.unet.get_submodule(ours))
    text = model.conditioner.find(TextEncoder)
    if text is None:
        return targets
    used = [name for name in _layer_names(text) if not name.startswith(text.unused)]
    for ours, theirs in text_layers(used).items():
        layer, name = text.get_submodule(ours), f"text_encoder.{theirs}"
        if isinstance(layer, FusedAttention):
            targets |= {f"{name}.{QKV[part]}": Target(layer, part) for part in range(3)}
        else:
            targets[name] = Target(layer)
    return targets


def kohya_name(name: str) -> str:
    """Diffusers' name of a layer -> kohya's; also takes the variants that files have."""
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


def _build_layer(target: Target, tensors: Mapping[str, Tensor]) -> LoRALayer:
    with meta_device():
        layer = LoRALayer(target, rank=len(tensors["down"]))
    state = {
        "lora_down.weight": tensors["down"].reshape(layer.lora_down.weight.shape),
        "lora_up.weight": tensors["up"].reshape(layer.lora_up.weight.shape),
        "alpha": tensors.get("alpha", torch.tensor(float(layer.rank))).reshape(()),
    }
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)


def _tensors_by_layer(file: Checkpoint) -> dict[str, dict[str, Tensor]]:
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
    for part, kind in OTHER_KINDS.items():
        if any(part in key for key in others):
            message = f"`{file.path}` holds a {kind}, only LoRA and LoCon are supported"
            raise FileFormatError(message)
    if others or not layers:
        examples = ", ".join(f"`{key}`" for key in others[:3])
        raise FileFormatError(
            f"`{file.path}` is not a LoRA file: {len(others)} of its {len(file.state)} keys are "
            f"not recognised: {examples}"
        )
    if short := [name for name, tensors in layers.items() if not {"down", "up"} <= tensors.keys()]:
        message = f"`down` or `up` is missing in {len(short)} layers: `{short[0]}`"
        raise FileFormatError(f"`{file.path}`: {message}")
    for name, alpha in _read_alphas(file, layers).items():
        layers[name].setdefault("alpha", torch.tensor(float(alpha)))
    return layers


def _read_alphas(file: Checkpoint, names: Iterable[str]) -> dict[str, float]:
    """Alpha per layer, by kohya's name, from the adapter metadata of diffusers or peft."""
    metadata: dict[str, Any] = json.loads(file.metadata.get(METADATA, "{}"))
    config_path = file.path.with_name("adapter_config.json")
    if not metadata and config_path.is_file():
        config = json.loads(config_path.read_text("utf-8"))
        metadata = {f"unet.{key}": value for key, value in config.items()}
    alphas: dict[str, float] = {}
    for part, prefix in PARTS.items():
        for option in ("use_dora", "use_rslora"):
            if metadata.get(f"{part}.{option}"):
                raise FileFormatError(f"`{file.path}`: LoRA with `{option}` is not supported")
        names_of_part = [name for name in names if name.startswith(prefix)]
        if (alpha := metadata.get(f"{part}.lora_alpha")) is not None:
            alphas |= dict.fromkeys(names_of_part, alpha)
        for pattern, alpha in (metadata.get(f"{part}.alpha_pattern") or {}).items():
            suffix = pattern.replace(".", "_")
            alphas |= {name: alpha for name in names_of_part if name.endswith(suffix)}
    return alphas


def _check_layers(
    layers: Mapping[str, Mapping[str, Tensor]],
    targets: Mapping[str, Target],
    file: Checkpoint,
    model: LatentDiffusion,
) -> None:
    """Raise WeightsMismatch if a layer does not exist in the model or has another shape there."""
    unknown = [name for name in layers if name not in targets]
    shapes = []
    for name in layers.keys() & targets.keys():
        down, up = layers[name]["down"], layers[name]["up"]
        shape, expected = (len(up), *down.shape[1:]), tuple(targets[name].weight.shape)
        if _drop_1x1(shape) != _drop_1x1(expected) or up[0].numel() != len(down):
            shapes.append(f"{name}: shape {shape}, expected {expected}")
    if not (unknown or shapes):
        return
    message = (
        f"`{file.path}` does not fit this model: of its {len(layers)} layers {len(unknown)} are "
        f"unknown, {len(shapes)} have the wrong shape: {', '.join([*unknown, *shapes][:3])}"
    )
    theirs, ours = _likely_family(layers), FAMILY_BY_WIDTH.get(model.unet.context_dim)
    if theirs:
        message += f"\nhint: this looks like a LoRA for {theirs}"
        message += f", the model is {ours}" if ours else ""
    raise WeightsMismatch(message)


def _likely_family(layers: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The family by the names of the layers, else by the cross-attention dimension."""
    for pattern, family in OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in layers):
            return family
    widths = (tensors["down"].shape[1] for name, tensors in layers.items() if "attn2_to_k" in name)
    return FAMILY_BY_WIDTH.get(next(widths, 0))


def _drop_1x1(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without trailing 1x1 kernel dimensions, which some files omit."""
    return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)
