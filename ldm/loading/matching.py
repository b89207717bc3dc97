"""Match the weights of a file to a model by names and shapes, and explain what does not fit."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.encoders.text import OpenCLIPText
from ldm.encoders.towers import VOCAB_SIZE
from ldm.loading.diffusers.locations import (
    OLD_VAE_NAMES,
    TEXT_COMPONENTS,
    convert_from_diffusers,
    get_component_prefixes,
    locate_weights,
)
from ldm.loading.families import detect_family
from ldm.loading.weight_names import (
    TEXT_2_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    has_prefix,
    has_sgm_names,
    select_prefix,
    to_original_name,
)
from ldm.model import LatentDiffusion
from ldm.runtime.errors import WeightsMismatch

__all__ = [
    "TOKEN_EMBEDDING", "TOKEN_IDS", "check_weights", "drop_1x1", "guess_file_type", "match_weights",
    "translate_names",
]  # fmt: skip

log = logging.getLogger(__name__)

COMPONENT_PREFIXES = (UNET_PREFIX, VAE_PREFIX, "conditioner.")
# Prefix -> title of components that some files of whole models do not contain.
SEPARABLE_COMPONENTS = {
    VAE_PREFIX: "autoencoder", TEXT_PREFIX: "text encoder", TEXT_2_PREFIX: "second text encoder"
}  # fmt: skip
# Suffixes of names that only older versions of transformers and diffusers write.
OBSOLETE_SUFFIXES = ("position_ids", "text_projection.weight", "logit_scale")
# Tables of an encoder's noise schedule, which it computes.
SCHEDULE_TABLE = re.compile(r"conditioner\..*\.(betas|\w*alphas_cumprod\w*)")
TEXT_BLOCKS = f"{TEXT_PREFIX}model.transformer.resblocks."
# Of a compact vocabulary: the ids of its tokens in CLIP's vocabulary, and their embeddings.
TOKEN_IDS, TOKEN_EMBEDDING = f"{TEXT_PREFIX}token_ids", f"{TEXT_PREFIX}model.token_embedding.weight"
# In names of tensors that accompany the weights of quantized layers.
QUANTIZED_LAYER = re.compile(
    r"scale_weight|scale_input|weight_scale|absmax|quant_(map|state)|\.SCB$"
)
MAX_LISTED_NAMES = 10  # in each line of a message
# Pattern in names of tensors -> type of a file that is not a model.
FILE_TYPES = {
    # Before LoRAs: Control-LoRAs have a tensor `lora_controlnet`.
    r"control_model|controlnet|zero_convs|lllite_": "a ControlNet, which is not supported",
    r"lora_|\.lora\.|lokr_|hada_": "a LoRA, which is merged into a model (`loras`)",
    r"string_to_param|emb_params|^<": "a textual inversion, which is added to a model "
    "(`embeddings`)",
    r"^(time_embed|input_blocks|output_blocks)\.": "only a UNet",
    r"concept_embeds": "the safety checker of Stable Diffusion 1 (`safety_checker`)",
    r"^visual\.(conv1|proj)\b|^vision_model\.": "a CLIP, for CLIP score (`ldm evaluate --clip`)",
    r"^(conv_in|down_blocks|text_model)\.": "a component of a diffusers folder",
    r"^(\w*coder\.)?(layers\.)?\d+\.conv\.0\.": "TAESD, a small autoencoder (`vae`)",
    r"quantize\.embed\.": "a model with a VQ autoencoder of Gumbel-softmax, which is not supported",
    r"^encoder\.down(\.\d+\.block|_blocks)\.": "only an autoencoder, which replaces a model's "
    "(`vae`)",
    r"^Mixed_5b\.": "an Inception network, for FID (`ldm evaluate --inception`)",
    r"double_blocks|joint_blocks": "SD 3 or Flux, which are not supported",
}


def match_weights(
    model: nn.Module, state: Mapping[str, Tensor], file: str | Path, error_prefix: str | None = None
) -> dict[str, Tensor]:
    """Return the weights of a model or component, under its names and in its shapes.

    Accepts diffusers' names and 1x1 kernels stored as matrices. Unused weights may be missing.
    Tensors that belong to no component of the model are left out, with a warning.

    Args:
        state: Weights of the file under our names; for a component also names without prefix.
        error_prefix: First words of an error, before the counts; None = "`file` does not fit the
            config".

    Raises:
        WeightsMismatch: Names are missing or unexpected, or shapes differ.
    """
    expected = model.state_dict()
    state = _adapt_text_encoder(model, _select_component(model, state))
    state = translate_names(model, state, file)
    state |= _make_unused_weights(model, state, file)
    unused = [n for n in state if n not in expected and not n.startswith(COMPONENT_PREFIXES)]
    if isinstance(model, LatentDiffusion) and unused and expected.keys() <= state.keys():
        log.warning("`%s`: tensors not of this model are ignored: %s", file, _format_groups(unused))
        state = {name: value for name, value in state.items() if name not in unused}
    check_weights(expected, state, error_prefix or f"`{file}` does not fit the config")
    return state


def check_weights(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], error_prefix: str
) -> None:
    """Raise WeightsMismatch unless weights have the expected names and shapes.

    The message has counts, the first names (the original's), and the likely cause.

    Args:
        error_prefix: First words of the message, such as "`x.ckpt` does not fit x.yaml".
    """
    to_original = partial(to_original_name, sgm=has_sgm_names(expected))
    problems = {
        "missing": [to_original(name) for name in expected if name not in state],
        "unexpected": [to_original(name) for name in state if name not in expected],
        "mismatched": [
            f"{to_original(name)} {tuple(state[name].shape)}, expected {tuple(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ]
        + [
            f"{to_original(name)} of {state[name].dtype}"
            for name, value in expected.items()
            if name in state and value.is_floating_point() > state[name].is_floating_point()
        ],
    }
    if not any(problems.values()):
        return
    counts = ", ".join(f"{len(names)} {problem}" for problem, names in problems.items())
    lines = [f"{error_prefix}: {counts}"]
    for problem, names in problems.items():
        if names:
            more = ", …" if len(names) > MAX_LISTED_NAMES else ""
            lines.append(f"{problem}: {', '.join(names[:MAX_LISTED_NAMES])}{more}")
    if cause := _find_cause(expected, state, problems["unexpected"]):
        lines.append(f"hint: {cause}")
    raise WeightsMismatch("\n".join(lines))


def guess_file_type(names: Iterable[str]) -> str | None:
    """Return the type of a file that is not a model, by the names in it; None = unknown."""
    text = "\n".join(names)
    types = (title for pattern, title in FILE_TYPES.items() if re.search(pattern, text, re.M))
    return next(types, None)


def translate_names(
    model: nn.Module, state: Mapping[str, Tensor], file: str | Path
) -> dict[str, Tensor]:
    """Return weights under our names and in a model's shapes; unknown weights are not changed.

    Args:
        model: The model, which may be on the meta device.
        state: Weights under our names, or under diffusers' names with our prefixes.
    """
    expected, renamed = model.state_dict(), dict(state)
    if expected.keys() == state.keys():
        return {n: _adapt_shape(n, value, expected[n], file) for n, value in renamed.items()}
    prefixes = get_component_prefixes(model)
    for component, locations in locate_weights(model).items():
        prefix = prefixes[component]
        names = [n for n in state if n.startswith(prefix) and n not in expected]
        component_state = {
            _to_current_name(component, name.removeprefix(prefix)): renamed.pop(name)
            for name in names
        }
        keys = {key for location in locations.values() for key in location.keys}
        component_state = {
            name: value
            for name, value in component_state.items()
            if name in keys or not name.endswith(OBSOLETE_SUFFIXES)
        }
        converted = convert_from_diffusers(locations, component_state)
        used_keys = {key for name in converted for key in locations[name].keys}
        renamed |= {prefix + n: v for n, v in component_state.items() if n not in used_keys}
        renamed |= converted
    return {n: _adapt_shape(n, value, expected.get(n), file) for n, value in renamed.items()}


def _find_cause(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], unexpected: Collection[str]
) -> str | None:
    """Return the likely cause of a mismatch, and its remedy; None = unknown.

    Args:
        unexpected: The original's names of weights that are not expected.
    """

    def list_missing(prefixes: Iterable[str]) -> list[str]:
        return [p for p in prefixes if has_prefix(expected, p) and not has_prefix(state, p)]

    to_original = partial(to_original_name, sgm=has_sgm_names(expected))
    missing, family = list_missing(SEPARABLE_COMPONENTS), detect_family(state)
    if any(QUANTIZED_LAYER.search(name) for name in unexpected):
        return "the weights are quantized, which is not supported"
    if TOKEN_IDS in expected and TOKEN_IDS not in state and has_prefix(state, TEXT_PREFIX):
        return (
            "the config has a compact vocabulary (`compact_vocab`), the weights have CLIP's: "
            "use the config of the weights, which a diffusers folder or its conversion contains"
        )
    if family is not None and missing and not unexpected:
        titles = [f"{SEPARABLE_COMPONENTS[p]} (`{to_original(p)}`)" for p in missing]
        only_autoencoder = missing == [VAE_PREFIX]
        remedy = (
            "pass one (`vae`)"
            if only_autoencoder
            else "pass one of the whole model (`text_encoder`)"
        )
        return f"the file has no {' and no '.join(titles)}: {remedy}"
    if family is not None:
        config = f"`{family.config}.yaml`" if family.config else "which is not supported"
        return f"the weights look like {family.title} ({config})"
    file_type = guess_file_type(state)
    if file_type is not None and file_type != guess_file_type(expected):
        return f"the file is {file_type}"
    if missing := list_missing((UNET_PREFIX, *SEPARABLE_COMPONENTS)):
        return f"the file has no weights {', '.join(f'`{to_original(p)}*`' for p in missing)}"
    return None


def _select_component(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a component, without prefix; for a whole model, all weights."""
    if isinstance(model, LatentDiffusion):
        return dict(state)
    components = locate_weights(model).values()
    locations = [location for component in components for location in component.values()]
    names = [*model.state_dict(), *(name for location in locations for name in location.keys)]
    candidates = ("", UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX)
    prefix = next((p for p in candidates if any(p + name in state for name in names)), "")
    return select_prefix(state, prefix)


def _adapt_text_encoder(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapt a text encoder's weights: drop unused blocks of zeros, and compact the vocabulary.

    SD 2's last block, which is not run, may be zeros. Diffusers folders have CLIP's vocabulary,
    with equal rows for all tokens that a compact vocabulary does not have.
    """
    expected = model.state_dict()
    blocks = [n for n in state if n.startswith(TEXT_BLOCKS) and n not in expected]
    if not any(state[name].any() for name in blocks):
        state = {name: value for name, value in state.items() if name not in blocks}
    if TOKEN_IDS in expected and TOKEN_IDS not in state and TOKEN_EMBEDDING in state:
        table = state[TOKEN_EMBEDDING]
        unknown = table.mode(dim=0).values  # the row of tokens that are not in the vocabulary
        ids = (table != unknown).any(dim=1).nonzero().flatten()
        num_unused = len(expected[TOKEN_IDS]) - len(ids)  # rows of the model without a token
        if num_unused >= 0:
            state[TOKEN_IDS] = torch.cat([ids, len(table) + torch.arange(num_unused)])
            rows = [unknown[None], table[ids], unknown.expand(num_unused, -1)]
            state[TOKEN_EMBEDDING] = torch.cat(rows)
    return state


def _make_unused_weights(
    model: nn.Module, state: Mapping[str, Tensor], file: str | Path
) -> dict[str, Tensor]:
    """Return unused weights that other programs leave out.

    These are zeros for the projection of OpenCLIP's text encoder, and for its last block if it is
    not run; and the tables of the encoders' noise schedules.
    """
    encoders = model.conditioner.encoders if isinstance(model, LatentDiffusion) else {}
    expected = model.state_dict()
    tables = {n: v for n, v in expected.items() if SCHEDULE_TABLE.fullmatch(n) and n not in state}
    missing: dict[str, Tensor] = {}
    for encoder_name, encoder in encoders.items():
        prefix = f"conditioner.{encoder_name}."
        dtype = next((v.dtype for name, v in state.items() if name.startswith(prefix)), None)
        if not isinstance(encoder, OpenCLIPText) or dtype is None:
            continue  # the whole encoder is missing, which is an error
        unused = tuple(prefix + name for name in encoder.unused_weights)
        missing |= {
            name: torch.zeros(value.shape, dtype=dtype)
            for name, value in expected.items()
            if name.startswith(unused) and name not in state
        }
    if missing:
        log.info("`%s`: %d unused tensors of the text encoder are missing", file, len(missing))
    return missing | tables


def _adapt_shape(name: str, value: Tensor, expected: Tensor | None, file: str | Path) -> Tensor:
    """Return a weight with the model's 1x1 kernels, and without added tokens.

    Weights of other shapes are not changed: `check_weights` reports them.
    """
    if expected is None or value.shape == expected.shape:
        return value
    if drop_1x1(value.shape) == drop_1x1(expected.shape):
        return value.reshape(expected.shape)
    is_token_embedding = name.endswith("token_embedding.weight") and len(expected) >= VOCAB_SIZE
    if is_token_embedding and value[: len(expected)].shape == expected.shape:
        num_added = len(value) - len(expected)
        log.warning("`%s`: %d added tokens without names are left out", file, num_added)
        return value[: len(expected)]
    return value


def drop_1x1(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape (C_out, C_in, 1, 1) as (C_out, C_in), and any other shape unchanged."""
    return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)


def _to_current_name(component: str, name: str) -> str:
    """Convert a name of older versions of diffusers or transformers to the current one."""
    if component in TEXT_COMPONENTS:
        name = name.removeprefix("model.").removeprefix("transformer.")
        return name if name.startswith("text_") or "." not in name else f"text_model.{name}"
    if component == "vae" and ".attentions." in name:
        for new, old in OLD_VAE_NAMES.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def _format_groups(names: Iterable[str]) -> str:
    """Return the first words of names, with counts, as text."""
    groups = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"`{group}` ({count} tensors)" for group, count in groups.items())
