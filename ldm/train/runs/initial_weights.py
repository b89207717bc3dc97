"""Load the initial weights of a run, from files that its config names."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.loading import legacy
from ldm.loading.matching import match_weights
from ldm.loading.published import resolve_checkpoint
from ldm.loading.weight_names import rename_weights, select_prefix
from ldm.loading.weights import Weights, identify_weights, open_checkpoint
from ldm.model import LatentDiffusion
from ldm.runtime.files import find_file
from ldm.runtime.types import JsonMapping

__all__ = ["load_initial_weights", "resize_weight", "set_scale_by_std"]

log = logging.getLogger(__name__)


def load_initial_weights(model: nn.Module, params: JsonMapping) -> bool:
    """Load `ckpt_path` of the model and of its first stage, files or folders, if set.

    The EMA starts from these weights, as with the original's `reset_ema`. With `scale_by_std`, the
    scale factor in the file is loaded, too.

    Args:
        params: `model.params` of the config. These of the original's options are supported:
            `load_only_unet`; `ignore_keys`: prefixes of names not to load; `finetune_keys`: weights
            that may have fewer input channels in the file (default: the UNet's first), with zeros
            for the new ones; `make_it_fit`: weights may have other shapes, see `resize_weight`.
    Returns:
        Whether the model itself was loaded, so that this is a fine-tune.
    Raises:
        ValueError: The weights do not fit the model.
    """
    first_stage = (params.get("first_stage_config") or {}).get("params") or {}
    is_partial = not params.get("ckpt_path") or params.get("load_only_unet")
    # A first stage that a whole model would overwrite is not read: its file may be missing by now.
    if first_stage.get("ckpt_path") and (is_partial or params.get("ignore_keys")):
        _load_checkpoint(model.get_submodule("autoencoder"), first_stage, "autoencoder.")
    if not params.get("ckpt_path"):
        if params.get("finetune_keys"):
            raise ValueError("`finetune_keys` needs a `ckpt_path` to start from")
        return False
    widened_keys = params.get("finetune_keys", [legacy.INPUT_CONV]) or ()
    if not isinstance(model, LatentDiffusion):
        _load_checkpoint(model, params, "autoencoder.", widened_keys)
        return True
    if params.get("load_only_unet"):
        weights = _load_checkpoint(model.unet, params, "unet.", widened_keys)
    else:
        weights = _load_checkpoint(model, params, "", widened_keys)
    prediction = weights.prediction_type
    if prediction.value not in (None, model.parameterization):
        log.warning(
            "`%s` looks like a model that predicts %s, the config says %s: %s",
            weights.path, prediction.value, model.parameterization, prediction,
        )  # fmt: skip
    if params.get("scale_by_std") and "scale_factor" in weights.buffers:
        model.scale_factor = float(weights.buffers["scale_factor"])
    return True


def set_scale_by_std(model: LatentDiffusion, images: Tensor, generator: torch.Generator) -> None:
    """Set `scale_factor` so that the latents of these images have a standard deviation of 1.

    The original's `scale_by_std`: Rombach et al. 2022 (arXiv:2112.10752), appendix G.

    Args:
        images: (B, 3, H, W) in [-1, 1], the first batch of the data.
    """
    if model.scale_factor != 1:
        raise ValueError(
            f"scale_by_std needs `scale_factor` 1, not {model.scale_factor}, as it is measured"
        )
    with torch.no_grad():
        model.scale_factor = 1 / float(model.encode(images.to(model.device), generator).std())


def _load_checkpoint(
    module: nn.Module, params: JsonMapping, prefix: str, widened_keys: Sequence[str] = ()
) -> Weights:
    """Load the weights in `ckpt_path`; return all that the file contains.

    Args:
        prefix: Prefix of the module's weights in a file of a whole model.
        widened_keys: Weights that may have fewer input channels in the file.
    """
    path = resolve_checkpoint(params["ckpt_path"])
    weights = identify_weights(open_checkpoint(path if path.is_dir() else find_file(path)))
    state = select_prefix(weights.state_dict, prefix) or weights.state_dict
    current_state = module.state_dict()
    ignored_prefixes = tuple(params.get("ignore_keys") or ())
    state = {n: v for n, v in state.items() if not n.startswith(ignored_prefixes)}
    for name in rename_weights(dict.fromkeys(widened_keys, torch.empty(0))):
        name = name.removeprefix(prefix)
        if name in state and name in current_state:
            state[name] = _add_input_channels(state[name], current_state[name])
    if params.get("make_it_fit"):
        for name in state.keys() & current_state.keys():
            state[name] = resize_weight(state[name], current_state[name].shape)
    # Ignored weights keep their current values, which `match_weights` requires to be given.
    state = {n: v for n, v in current_state.items() if n.startswith(ignored_prefixes)} | state
    module.load_state_dict(match_weights(module, state, params["ckpt_path"]))
    return weights


def _add_input_channels(weight: Tensor, like: Tensor) -> Tensor:
    """Append zeros, which have no effect, to a weight (out, in, …) with fewer input channels."""
    is_same_otherwise = weight.shape[:1] + weight.shape[2:] == like.shape[:1] + like.shape[2:]
    if not is_same_otherwise or weight.shape[1:2] >= like.shape[1:2]:
        return weight
    widened = torch.zeros_like(like)
    widened[:, : weight.shape[1]] = weight
    return widened


def resize_weight(weight: Tensor, shape: torch.Size) -> Tensor:
    """Resize a weight (out, in, …) or bias (out,) by repeating outputs and inputs.

    An input that occurs n times is divided by n + 1, as in the original.
    """
    if weight.shape == shape:
        return weight
    resized = weight[torch.arange(shape[0]) % len(weight)]
    if len(shape) == 1:
        return resized
    inputs = torch.arange(shape[1]) % weight.shape[1]
    repeats = inputs.bincount()[inputs] + 1
    return resized[:, inputs] / repeats.view(-1, *(1,) * (len(shape) - 2))
