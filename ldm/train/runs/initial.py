"""What a run starts from: weights of a model, or of parts of it, that its config names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.source import Source
from ldm.loading import legacy
from ldm.loading.build import add_unused_weights, check_weights
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.legacy import rename_weights, schedule_tables
from ldm.model import LatentDiffusion
from ldm.runtime.files import find_file
from ldm.train.tasks import diffusion

__all__ = ["from_checkpoints", "measure_scale"]


def from_checkpoints(model: nn.Module, params: Mapping[str, Any]) -> bool:
    """Loads `ckpt_path` of the model and of its first stage, where the config names one.

        params: of the model, as in the config.

    The original's switches hold: `load_only_unet`; `ignore_keys`, starts of names that are not
    taken from the file; `finetune_keys`, weights that may have fewer input channels there (if not
    said, the UNet's first): the new ones start at zero; `make_it_fit`, all weights may have another
    width there, see `fitted`. The average starts from these weights, as with `reset_ema`. With
    `scale_by_std` the scale that was measured for them is taken too.

    Returns whether the model itself had weights to start from, so that this is a fine-tune.
    """
    first = (params.get("first_stage_config") or {}).get("params") or {}
    if first.get("ckpt_path"):
        _put(model.get_submodule("autoencoder"), first, "autoencoder.")
    if params.get("ckpt_path"):
        is_whole = isinstance(model, LatentDiffusion)
        part = "unet." if params.get("load_only_unet") else "" if is_whole else "autoencoder."
        widened = params.get("finetune_keys", [legacy.FIRST_WEIGHT]) or ()
        tables = _put(model.get_submodule("unet" if part == "unet." else ""), params, part, widened)
        measured = params.get("scale_by_std") and "scale_factor" in tables
        if measured and isinstance(model, LatentDiffusion):
            model.scale_factor = float(tables["scale_factor"])
        return True
    if params.get("finetune_keys"):
        raise ValueError("`finetune_keys` needs a `ckpt_path` to start from")
    return False


def measure_scale(
    model: LatentDiffusion, source: Source, data: Mapping[str, Any], generator: torch.Generator
) -> None:
    """Sets `scale_factor` by the latents of the first batch, the same on all processes.

        data: `data.params` of the config.
    Raises ValueError if latents are cached, as those would have another scale.
    """
    if data.get("latents"):
        raise ValueError("`scale_by_std` does not go with `data.params.latents`")
    first = [sample["jpg"] for sample in source.first_samples(data["batch_size"])]
    diffusion.measure_scale(model, torch.stack(first), generator)


def _put(
    module: nn.Module, params: Mapping[str, Any], prefix: str, widened: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Loads the file `ckpt_path`, or the part `prefix` of it if it holds a whole model.

    Returns the numbers that the file has beside weights.
    """
    raw = read_checkpoint(find_file(params["ckpt_path"])).state
    state, tables = rename_weights(raw), schedule_tables(raw)
    if any(name.startswith(prefix) for name in state):
        state = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    wanted, ignored = module.state_dict(), tuple(params.get("ignore_keys") or ())
    state = {n: v for n, v in state.items() if not n.startswith(ignored)}
    for name in rename_weights(dict.fromkeys(widened, torch.empty(0))):
        name = name.removeprefix(prefix)
        if name in state and name in wanted and _is_narrower(state[name], wanted[name]):
            wide = torch.zeros_like(wanted[name])
            wide[:, : state[name].shape[1]] = state[name]
            state[name] = wide
    if params.get("make_it_fit"):
        state = {n: fitted(v, wanted[n].shape) if n in wanted else v for n, v in state.items()}
    add_unused_weights(module, state, params["ckpt_path"])
    kept = {n: v for n, v in wanted.items() if n.startswith(ignored)}
    check_weights(wanted, kept | state, f"`{params['ckpt_path']}` does not fit the config")
    module.load_state_dict(kept | state)
    return tables


def _is_narrower(old: Tensor, new: Tensor) -> bool:
    """Whether a weight (out, in, …) only lacks inputs."""
    rest = old.shape[:1] + old.shape[2:], new.shape[:1] + new.shape[2:]
    return rest[0] == rest[1] and old.shape[1:2] < new.shape[1:2]


def fitted(old: Tensor, shape: torch.Size) -> Tensor:
    """A weight (out, in, …) or bias (out,) of another width: outputs and inputs are repeated.

    Inputs that stand for one of old are divided by one more than their number, as in the original.
    """
    if old.shape == shape:
        return old
    new = old[torch.arange(shape[0]) % len(old)]
    if len(shape) == 1:
        return new
    inputs = torch.arange(shape[1]) % old.shape[1]
    uses = inputs.bincount()[inputs] + 1
    return new[:, inputs] / uses.view(-1, *(1,) * (len(shape) - 2))
