"""A YAML and a weights file -> a model: where config, old names, files and families meet.

    raw   = config.read(path, overrides)
    spec  = legacy.translate(raw)                  old words -> ours
    model = on_meta(spec)                          no memory, no initialisation
    state = legacy.rename(checkpoint.read(ckpt))   memory-mapped
    model.load_state_dict(state, assign=True)      strict: every tensor, every shape

Nothing is downloaded. Where device and dtype stay as in the file, weights are pages of that file.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.loading import checkpoint, config as configs, families, legacy, midas as depth, statistics
from ldm.loading.checkpoint import Checkpoint
from ldm.model import LatentDiffusion

__all__ = ["choose_config", "fill", "load", "markers", "on_meta", "save"]

log = logging.getLogger(__name__)

DEMO = ("configs/demo/text2img.yaml", "checkpoints/demo.safetensors")
PUBLISHED = "configs/stable-diffusion"
EMBEDDED = "ldm.config"  # metadata key under which a file carries its own YAML
PREFIXES = ("", "unet.", "autoencoder.", "conditioner.text.")
TABLE_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of schedule tables; float32: 1e-5


def load(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    overrides: Iterable[str] = (),
    allow: Sequence[str] = (),
    clip_stats: str | Path | None = None,
    midas: str | Path | None = None,
) -> LatentDiffusion:
    """The model that a config describes, with the weights of a checkpoint.

        config: a YAML; None recognises the family from the weights. Both None: the demo model.
        dtype: of all weights; every part computes in the dtype of its weights.
        ema: the averaged weights of a file that has both.
        overrides: `model.params.scale_factor=0.13`, applied to the YAML.
        allow: packages of your own whose classes the YAML may name.
        clip_stats: statistics of CLIP's embeddings, for unCLIP models that do not find theirs.
        midas: the depth network, for depth models whose checkpoint lacks it or for another one.
    Returns the model in eval mode (or the part, for the config of a single part); `provenance`
    says what it was made of.
    Raises FileNotFoundError, or ValueError saying what does not fit what.
    """
    if config is None and ckpt is None:
        config, ckpt = _demo()
    if ckpt is None:
        raise ValueError("a config alone has no weights\nhint: pass a checkpoint as well")
    file = checkpoint.read(ckpt, ema) if config is None else None
    source = str(config) if file is None else choose_config(file)
    if file is not None and source == EMBEDDED:
        raw = configs.parse(file.metadata[EMBEDDED], overrides, where=source)
    else:
        raw = configs.read(source, overrides)
    where, skipped = Path(source).name, list[str]()
    spec = legacy.translate(raw, where=where, skipped=skipped)
    model = on_meta(spec, allow=allow, where=where, skipped=skipped)
    if file is None:
        file = checkpoint.read(ckpt, ema, legacy.rename_back(model.state_dict()))
    state, tables, notes = legacy.rename(file.state), legacy.tables(file.state), markers(file)
    file.state.clear()  # so that memory is given back while `state` is used up
    misfit = f"`{file.path}` does not fit {where}"
    lent = depth.borrow(model.state_dict(), state, file.path, midas)
    fill(model, state, device=device, dtype=dtype, mapped=file.mapped and not lent, misfit=misfit)
    if skipped:
        log.info("not needed for sampling, skipped: %s", ", ".join(skipped))
    if isinstance(model, LatentDiffusion):
        _check_tables(model, tables, misfit)
        statistics.use(model.conditioner, file.path, clip_stats, tables)
        _check_averages(raw, file)
        model.provenance = {"config": source, **_origin(raw, file), "skipped": skipped}
        _check_prediction(model, file, notes, given=config is not None)
    return cast(LatentDiffusion, model.eval())


def on_meta(
    spec: Mapping[str, Any],
    *,
    allow: Sequence[str] = (),
    where: str = "config",
    skipped: list[str] | None = None,
) -> nn.Module:
    """The module of a translated config without memory: every weight is on the meta device."""
    args: dict[str, Any] = {"allow": allow, "skipped": skipped}
    if spec["target"] != legacy.MODEL:
        with torch.device("meta"), _NoInit():
            return cast(nn.Module, configs.instantiate(spec, where=where, **args))
    parts = dict(spec["params"])
    for name in ("unet", "autoencoder", "conditioner"):  # the rest is numbers, wanted for real
        with torch.device("meta"), _NoInit():
            parts[name] = configs.instantiate(parts[name], where=f"{where}.{name}", **args)
    return cast(nn.Module, configs.instantiate({**spec, "params": parts}, where=where, **args))


def fill(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
    misfit: str = "the weights do not fit",
) -> None:
    """Puts weights into a model on the meta device, strictly; `state` is used up.

        state: under our names, as `legacy.rename` gives them; for a single part also bare names.
        mapped: the tensors are pages of a file: those that are copied are given back at once, so
            that the peak is what the model keeps.
    Raises ValueError with counts and the first ten names that do not fit.
    """
    wanted = model.state_dict()
    prefix = next((p for p in PREFIXES if any(p + name in state for name in wanted)), "")
    for name in [name for name in state if not name.startswith(prefix)]:
        del state[name]  # other parts of a whole model
    _check_fit(wanted, {n.removeprefix(prefix): v for n, v in state.items()}, misfit)
    weights: dict[str, Tensor] = {}
    for name in list(state):  # in the order of the file, so that the system reads ahead
        old = state.pop(name)
        kind = dtype if old.is_floating_point() else old.dtype
        weights[name.removeprefix(prefix)] = new = old.to(device=device, dtype=kind)
        if mapped and new.data_ptr() != old.data_ptr():
            checkpoint.release(old)
    model.load_state_dict(weights, strict=True, assign=True)
    if dtype == torch.float16 and hasattr(getattr(model, "conditioner", None), "lowres"):
        cast(LatentDiffusion, model).autoencoder.float()  # the upscaler's overflows in float16


def save(
    model: LatentDiffusion, path: str | Path, metadata: Mapping[str, str | int] | None = None
) -> None:
    """Writes a model in the layout of the original, readable by every program that reads those.

    metadata: kept beside the weights; the YAML's text under `ldm.config` lets `load` do without.
    """
    state = legacy.rename_back(model.state_dict(), model.schedule.buffers())
    checkpoint.write(path, state | statistics.tables(model.conditioner), metadata)


def choose_config(file: Checkpoint) -> str:
    """The YAML for weights that came without one, by what they look like.

    Raises ValueError if they look like no published family, or a family this project has not.
    """
    if EMBEDDED in file.metadata:
        return EMBEDDED
    state = legacy.rename(file.state)
    family = families.recognise(state)
    if family is None or not family.config:
        looks = f"looks like {family.title}, which is not supported" if family else "is unknown"
        raise ValueError(f"`{file.path}` {looks}\nhint: pass its config (--config)")
    found = families.predict(family, state, step=file.step, markers=markers(file))
    name = family.config_for(found.kind)
    log.info("`%s` is %s; config %s; predicts %s", file.path, family.title, name, found)
    return f"{PUBLISHED}/{name}.yaml"


def _demo() -> tuple[str, str]:
    try:
        config, ckpt = (str(configs.find(path)) for path in DEMO)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the demo model is not here: {error}\nhint: pass a config and a checkpoint"
        ) from error
    return config, ckpt


def markers(file: Checkpoint) -> dict[str, str]:
    """What the file says about itself: its metadata, and empty tensors that serve as notes."""
    return {**file.metadata, **{key: "" for key in legacy.MARKERS if key in file.state}}


def _check_fit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], misfit: str) -> None:
    missing = [legacy.old_name(name) for name in wanted if name not in state]
    unexpected = [legacy.old_name(name) for name in state if name not in wanted]
    shapes = [
        f"{legacy.old_name(name)} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [
        f"{kind}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} of another shape"
    family = families.recognise(state)
    if family is not None:
        lines.append(f"hint: the weights look like {family.title} (`{family.config}.yaml`)")
    raise ValueError("\n".join([f"{misfit}: {counts}", *lines]))


def _origin(raw: Mapping[str, Any], file: Checkpoint) -> dict[str, Any]:
    """What a model was made of: the config's hash, the file, its step, and which weights of it."""
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode())
    return {
        "config_hash": digest.hexdigest()[:10],
        "checkpoint": str(file.path),
        "step": file.step,
        "ema": file.ema,
    }


def _check_tables(model: LatentDiffusion, tables: Mapping[str, Tensor], misfit: str) -> None:
    """Compares the schedule in the file with the config's, which is the one that is used."""
    if "scale_factor" in tables:  # kept by models trained with `scale_by_std`
        model.scale_factor = float(tables["scale_factor"])
    ours = model.schedule.buffers()
    for name in sorted(ours.keys() & tables.keys()):
        theirs, tolerance = tables[name], TABLE_ERROR.get(tables[name].dtype, 1e-5)
        if theirs.shape != ours[name].shape:
            difference = f"{len(theirs)} steps for {len(ours[name])}"
        elif (
            error := float((theirs.float() - ours[name]).abs().max() / ours[name].abs().max())
        ) > tolerance:
            difference = f"{error:.2g} of its largest value"
        else:
            continue
        warnings.warn(
            f"{misfit}: its noise schedule is another one (`{name}` differs by {difference}); the "
            "config's is used, check `linear_start`, `linear_end` and `beta_schedule`",
            stacklevel=3,
        )
        return


def _check_averages(raw: Mapping[str, Any], file: Checkpoint) -> None:
    """The original samples with averaged weights where the config says `use_ema` and they exist."""
    params = raw.get("model", raw).get("params") or {}
    if not file.has_ema or file.ema:
        return
    asks = "asks" if params.get("use_ema", True) else "does not ask"
    log.info(
        "`%s` also holds averaged (EMA) weights, the config %s for them; `ema` takes them",
        file.path,
        asks,
    )


def _check_prediction(
    model: LatentDiffusion, file: Checkpoint, notes: Mapping[str, str], *, given: bool
) -> None:
    """Holds what the weights look like against what the config says; warns of a contradiction.

    Without a given config two methods must have spoken; if they have not, the UNet is asked.
    """
    state = model.state_dict()
    family = families.recognise(state)
    found = families.predict(family, state, step=file.step, markers=notes)
    if not given and family is not None and family.predicts is None and found.votes < 2:
        found = families.probe(model.unet, found, family.context or 0)
        if found.kind and found.kind != model.parameterization:
            model.parameterization = found.kind
            name = family.config_for(found.kind)
            model.provenance["config"] = f"{PUBLISHED}/{name}.yaml"
    model.provenance["prediction"] = str(found)
    if found.kind and found.kind != model.parameterization:
        warnings.warn(
            f"`{file.path}` looks like a model that predicts {found.kind}, the config says "
            f"{model.parameterization}: {found}; pictures will be noise if the config is wrong",
            stacklevel=3,
        )
    elif found.disputed and not given:
        warnings.warn(
            f"`{file.path}`: it is not sure what the model predicts: {found}\n"
            "hint: say it with a config (v2-inference.yaml: eps, v2-inference-v.yaml: v)",
            stacklevel=3,
        )


class _NoInit(TorchFunctionMode):
    """Skips filling meta tensors: without effect, but torch would load its compiler for it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in FILLS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


FILLS = frozenset(
    f"{name}_"
    for name in (
        "add", "clamp", "copy", "div", "erfinv", "fill", "mul", "normal", "trunc_normal", "uniform",
        "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "zero", "zeros",
        "ones", "constant", "orthogonal",
    )
)  # fmt: skip
