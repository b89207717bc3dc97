"""A config and a weights file become a model.

    weights  = identify_weights(read_weights(ckpt))    memory-mapped, under our names, with a family
    raw      = read_config(weights, config)            a YAML: given, embedded, or of the family
    model    = build_on_meta(translate_config(raw))    no memory, no initialisation
    fill_weights(model, weights.state)                 strict: every tensor, every shape
    load_loras(model), load_embeddings(model)          what is added to it

Nothing is downloaded. Where device and dtype stay as in the file, weights are pages of that file.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.loading.addons.embeddings import load_embeddings
from ldm.loading.addons.lora import load_loras
from ldm.loading.addons.midas import add_depth_network
from ldm.loading.build import add_unused_weights, build_on_meta, fill_weights
from ldm.loading.config import parse_yaml, read_yaml
from ldm.loading.families import Prediction, probe_prediction, zero_snr_markers
from ldm.loading.files.checkpoint import EMBEDDED, file_hash, write_checkpoint
from ldm.loading.files.clip_statistics import clip_statistics_tensors, load_clip_statistics
from ldm.loading.legacy import restore_names, translate_config
from ldm.loading.weights import AUTOENCODER, Weights, identify_weights, read_weights
from ldm.model import LatentDiffusion
from ldm.runtime.errors import (
    ArgumentError,
    MissingArgument,
    MissingFile,
    WeightsMismatch,
    WrongFamily,
)
from ldm.runtime.files import find_file

__all__ = ["choose_config", "load", "probe_weights", "read_config", "save_model"]

log = logging.getLogger(__name__)

DEMO = ("configs/demo/text2img.yaml", "checkpoints/demo.safetensors")
TABLE_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of rounded schedules; others: 1e-5


def load(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    overrides: Iterable[str] = (),
    allow: Iterable[str] = (),
    clip_stats: str | Path | None = None,
    midas: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Iterable[tuple[str | Path, float]] = (),
    embeddings: Iterable[str | Path] = (),
) -> LatentDiffusion:
    """The model that a config describes, with the weights of a checkpoint.

    Args:
        config: a YAML; None recognises the family from the weights. Both None: the demo model.
        ckpt: a .ckpt or .safetensors, or the folder of a diffusers pipeline or of a training run;
            may stand alone, `load("folder")`.
        dtype: of all weights; every part computes in the dtype of its weights.
        ema: the averaged weights of a file that has both.
        overrides: `model.params.scale_factor=0.13`, applied to the YAML.
        allow: packages of your own whose classes the YAML may name.
        clip_stats: statistics of CLIP's embeddings, for unCLIP models that do not find theirs.
        midas: the depth network, for depth models whose checkpoint has none or for another one.
        vae: what `ckpt` may be, to take the autoencoder from.
        loras: files and their strengths, to be merged into the model.
        embeddings: files of textual inversions, or folders of them: tokens for prompts.

    Returns:
        The model in eval mode (or the part, for the config of a single part); its `provenance`
        says what it was made of.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something does not fit; the message says what.
    """
    config, ckpt = _choose_files(config, ckpt)
    loras, embeddings = tuple(loras), tuple(embeddings)
    weights = identify_weights(read_weights(ckpt))
    source, raw = read_config(weights, config, overrides)
    where, skipped = Path(source).name, list[str]()
    misfit = f"`{weights.path}` does not fit {where}"
    spec = translate_config(raw, where=where, skipped=skipped)
    model = build_on_meta(spec, allow=tuple(allow), where=where, skipped=skipped)
    if ema:
        weights.use_averages(model.state_dict())
    provenance = {"config": source, **_provenance(raw, weights, ema, skipped)}
    if vae is not None:
        provenance["vae"] = _replace_autoencoder(model, weights, vae)
    add_unused_weights(model, weights.state, str(weights.path))
    if add_depth_network(model.state_dict(), weights.state, weights.path, midas):
        weights.mapped = False
    weights.release_source()
    fill_weights(
        model, weights.state, device=device, dtype=dtype, mapped=weights.mapped, misfit=misfit
    )
    if isinstance(model, LatentDiffusion):
        model.provenance = provenance
        _compare_schedules(model, weights.tables, misfit)
        load_clip_statistics(model.conditioner, weights.path, clip_stats, weights.tables)
        _check_prediction(model, weights, is_config_given=config is not None)
        load_loras(model, loras)
        load_embeddings(model, embeddings)
    elif loras or embeddings:
        raise WrongFamily("LoRAs and embeddings need a whole model, the config is that of a part")
    return cast(LatentDiffusion, model.eval())


def save_model(
    model: LatentDiffusion, path: str | Path, metadata: Mapping[str, str | int] | None = None
) -> None:
    """Write a model in the layout of the original, readable by every program that reads those.

    Args:
        metadata: kept beside the weights; the YAML's text under `ldm.config` lets `load` do
            without a config.
    """
    schedule = model.schedule
    tables = schedule.buffers()
    tables |= zero_snr_markers(model.parameterization, zero_snr=schedule.zero_snr)
    state = restore_names(model.state_dict(), tables)
    write_checkpoint(path, state | clip_statistics_tensors(model.conditioner), metadata)


def choose_config(weights: Weights) -> str:
    """The YAML for weights that come without one: `EMBEDDED` in their file, or the family's.

    Raises:
        MissingArgument: they look like no published family, or one that is not supported.
    """
    if EMBEDDED in weights.markers:
        return EMBEDDED
    family = weights.family
    if family is None or not family.config:
        looks = f"looks like {family.title}, which is not supported" if family else "is unknown"
        message = f"`{weights.path}` {looks}\nhint: pass its config"
        raise MissingArgument(message, "config")
    path = family.config_path(weights.prediction.kind)
    title, prediction = family.title, weights.prediction
    log.info("`%s` is %s; config %s; predicts %s", weights.path, title, path, prediction)
    return path


def read_config(
    weights: Weights, config: str | Path | None = None, overrides: Iterable[str] = ()
) -> tuple[str, dict[str, Any]]:
    """The config of weights: the given file, or the chosen one.

    Returns:
        (source, config): its path (or `EMBEDDED`), and its content as `read_yaml` gives it.
    """
    if config is not None:
        return str(config), read_yaml(config, overrides)
    source = choose_config(weights)
    if source == EMBEDDED:
        return source, parse_yaml(weights.markers[EMBEDDED], overrides, where=source)
    raw = read_yaml(source, overrides)
    if "ztsnr" in weights.markers:
        raw["model"]["params"].setdefault("rescale_betas_zero_snr", True)
    return source, raw


def probe_weights(weights: Weights) -> Prediction:
    """What weights predict; where it is in doubt, their UNet is built and asked.

    A UNet that does not fit is not asked. See `probe_prediction`.
    """
    if not _is_in_doubt(weights):
        return weights.prediction
    assert weights.family is not None
    spec = translate_config(read_yaml(weights.family.config_path(None)))
    unet = build_on_meta(spec["params"]["unet"])
    state = {name: value for name, value in weights.state.items() if name.startswith("unet.")}
    try:
        fill_weights(unet, state)
    except WeightsMismatch:
        return weights.prediction
    return probe_prediction(unet.eval(), weights.prediction, weights.family.context or 0)


def _is_in_doubt(weights: Weights) -> bool:
    """The family does not tell what the weights predict, and fewer than two methods have."""
    family = weights.family
    return family is not None and family.predicts is None and weights.prediction.votes < 2


def _choose_files(
    config: str | Path | None, ckpt: str | Path | None
) -> tuple[str | Path | None, str | Path]:
    """(config, checkpoint) that a call means; the config may be None."""
    if config is None and ckpt is None:
        try:
            return find_file(DEMO[0]), find_file(DEMO[1])
        except FileNotFoundError as error:
            message = f"the demo model is missing: {error}\nhint: pass a config and a checkpoint"
            raise MissingFile(message, "ckpt") from error
    if ckpt is not None:
        return config, ckpt
    if str(config).endswith((".yaml", ".yml")):
        message = "a config alone has no weights\nhint: pass a checkpoint as well"
        raise MissingArgument(message, "ckpt")
    return None, cast(str | Path, config)  # weights alone


def _replace_autoencoder(
    model: torch.nn.Module, weights: Weights, vae: str | Path
) -> dict[str, str]:
    """Take the autoencoder from another file; returns which one, for the provenance."""
    if not isinstance(model, LatentDiffusion):
        raise ArgumentError(
            "another autoencoder needs a whole model, the config is a part's", "vae"
        )
    source = read_weights(vae)
    tensors = model.state_dict().items()
    wanted = {name: value for name, value in tensors if name.startswith(AUTOENCODER)}
    weights.replace_autoencoder(source, wanted)
    return {"path": str(source.path.resolve()), "hash": file_hash(source.path)}


def _provenance(
    raw: Mapping[str, Any], weights: Weights, ema: bool, skipped: list[str]
) -> dict[str, Any]:
    """What a model is made of: the config's hash, the file, its step, and which weights of it."""
    if skipped:
        log.info("not needed for sampling, skipped: %s", ", ".join(skipped))
    if weights.source.has_ema and not ema:
        # The original samples with them where the config says `use_ema` and they exist.
        params = raw.get("model", raw).get("params") or {}
        asks = "asks" if params.get("use_ema", True) else "does not ask"
        log.info("`%s` also has EMA weights, the config %s for them", weights.path, asks)
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode())
    return {
        "config_hash": digest.hexdigest()[:10],
        "checkpoint": str(weights.path),
        "step": weights.source.step,
        "ema": ema,
        "skipped": skipped,
    }


def _compare_schedules(model: LatentDiffusion, tables: Mapping[str, Tensor], misfit: str) -> None:
    """Warn if the schedule in the file is not the config's, which is the one that is used."""
    if "scale_factor" in tables:  # kept by models trained with `scale_by_std`
        model.scale_factor = float(tables["scale_factor"])
    ours = model.schedule.buffers()
    for name in sorted(ours.keys() & tables.keys()):
        theirs, table = tables[name], ours[name]
        # Also of files that were in half precision once, and are float32 again.
        errors = (error for dtype, error in TABLE_ERROR.items() if _is_rounded(theirs, dtype))
        tolerance = next(errors, 1e-5)
        if theirs.shape != table.shape:
            difference = f"{len(theirs)} steps, the config has {len(table)}"
        else:
            error = float((theirs.float() - table).abs().max() / table.abs().max())
            if error <= tolerance:
                continue
            difference = f"{error:.2g} of its largest value"
        warnings.warn(
            f"{misfit}: its noise schedule is another one (`{name}` differs by {difference}); the "
            "config's is used, check `linear_start`, `linear_end` and `beta_schedule`",
            stacklevel=3,
        )
        return


def _is_rounded(table: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers can be written in another dtype."""
    return torch.equal(table.to(dtype).to(table.dtype), table)


def _check_prediction(model: LatentDiffusion, weights: Weights, *, is_config_given: bool) -> None:
    """Warn if the weights look like another parameterization than the config says.

    Without a given config two methods must have an answer; else the UNet is asked as well.
    """
    family, prediction = weights.family, weights.prediction
    if not is_config_given and family is not None and _is_in_doubt(weights):
        prediction = probe_prediction(model.unet, prediction, family.context or 0)
        if prediction.kind and prediction.kind != model.parameterization:
            model.parameterization = prediction.kind
            model.provenance["config"] = family.config_path(prediction.kind)
    model.provenance["prediction"] = str(prediction)
    if prediction.kind and prediction.kind != model.parameterization:
        warnings.warn(
            f"`{weights.path}` looks like a model that predicts {prediction.kind}, the config says "
            f"{model.parameterization}: {prediction}; images will be noise if the config is wrong",
            stacklevel=3,
        )
    elif prediction.disputed and not is_config_given:
        warnings.warn(
            f"`{weights.path}`: methods disagree about what the model predicts: {prediction}\n"
            "hint: pass a config (v2-inference.yaml: eps, v2-inference-v.yaml: v)",
            stacklevel=3,
        )
