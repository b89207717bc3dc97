"""Cache loaded models, and share equal components between them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.app.catalog import list_file_stats
from ldm.encoders.text import OpenCLIPText, TextEncoder
from ldm.loading.addons.lora import set_loras
from ldm.loading.load import load
from ldm.model import LatentDiffusion
from ldm.runtime.types import JsonObject

__all__ = ["ModelCache"]

SETTING_TYPES = (bool, int, float, str, tuple, list, type(None))


class ModelCache:
    """Loads models like `load`, and keeps the most recently used ones.

    Encoders and autoencoders of the same structure with equal weights are shared.

    Args:
        max_bytes: Maximum of all models together. The least recently used ones are evicted before
            another one is loaded. A model above the maximum is loaded alone.
        load: Loads a model.
    """

    def __init__(self, max_bytes: float, load: Callable[..., LatentDiffusion] = load) -> None:
        self.max_bytes = max_bytes
        self._load = load
        self._models: dict[object, LatentDiffusion] = {}  # the most recently used one last

    def __call__(
        self, config: str | Path | None = None, ckpt: str | Path | None = None, **options: Any
    ) -> LatentDiffusion:
        """Return a model; arguments as for `load`. Changed files are loaded again.

        A cached model is reused for other LoRAs, see `set_loras`.
        """
        loras = tuple(options.pop("loras", ()))
        ckpt_stats = list_file_stats(ckpt)
        files = (config, options.get("vae"), *options.get("embeddings", ()))
        stats = (ckpt_stats, *map(list_file_stats, files))
        base = options.get("base")  # identified by its provenance, as its repr is not unique
        key_options = options | ({} if base is None else {"base": base.provenance})
        key = (str(config), str(ckpt), stats, repr(sorted(key_options.items())))
        cached = self._models.get(key)
        # LoRAs are merged into weights, which the returned model may share with others.
        for other in self._models.values():
            if other is not cached and other.merged_changes is not None:
                set_loras(other, ())
        if cached is not None:
            self._models[key] = self._models.pop(key)
        else:
            self._models[key] = self._load_new(config, ckpt, ckpt_stats, options)
        model = self._models[key]
        if loras or model.merged_changes is not None:
            set_loras(model, loras)
        return model

    def _load_new(
        self,
        config: str | Path | None,
        ckpt: str | Path | None,
        ckpt_stats: Sequence[tuple[str, int, int]],
        options: dict[str, Any],
    ) -> LatentDiffusion:
        file_bytes = sum(size for _, size, _ in ckpt_stats)
        while self._models and self.nbytes + file_bytes > self.max_bytes:
            self._models.pop(next(iter(self._models)))
        # Return the memory of evicted models to the device; torch would keep it reserved.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model = self._load(config, ckpt, **options)
        for other in self._models.values():
            _share_modules(model, other)
        return model

    @property
    def count(self) -> int:
        """Number of models."""
        return len(self._models)

    @property
    def nbytes(self) -> int:
        """Bytes of all models together; shared tensors count once."""
        tensors = [t for model in self._models.values() for t in _iter_tensors(model)]
        for model in self._models.values():
            if model.merged_changes is not None:
                tensors += model.merged_changes.original_weights.values()
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _share_modules(model: LatentDiffusion, other: LatentDiffusion) -> None:
    """Replace encoders and autoencoder of a model with equal ones of another."""
    other_encoders = dict(other.conditioner.named_children())
    for name, encoder in list(model.conditioner.named_children()):
        if name in other_encoders and _is_equal(encoder, other_encoders[name]):
            model.conditioner.add_module(name, other_encoders[name])
    _share_text_encoders(model, other)
    if _is_equal(model.autoencoder, other.autoencoder):
        model.autoencoder = other.autoencoder


def _share_text_encoders(model: LatentDiffusion, other: LatentDiffusion) -> None:
    """Share text encoders under different names: SDXL's second one is a refiner's only one."""
    for encoder in model.conditioner.find_all(OpenCLIPText):
        for shared in other.conditioner.find_all(OpenCLIPText):
            if encoder is not shared and _is_equal(encoder.model, shared.model):
                encoder.model = shared.model


def _is_equal(module: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules have the same structure, settings, weights and device."""
    if module is other:
        return True
    if [_describe_module(m) for m in module.modules()] != [
        _describe_module(m) for m in other.modules()
    ]:
        return False
    pairs = list(zip(_iter_tensors(module), _iter_tensors(other), strict=True))
    if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
        return False
    return all(torch.equal(a, b) for a, b in pairs)


def _describe_module(module: nn.Module) -> tuple[type, JsonObject, list[str]]:
    """Return the class, the settings and the names of the tensors of a module."""
    settings: JsonObject = {
        name: _convert_tensors_to_lists(value)
        for name, value in vars(module).items()
        if isinstance(value, SETTING_TYPES) or inspect.isroutine(value)
    }
    if isinstance(module, TextEncoder):  # textual inversions are not in its state dict
        settings["added"] = {t: v.tolist() for t, v in module.added_embeddings.items()}
    names = [*module._parameters, *module._buffers]
    return type(module), settings, names


def _convert_tensors_to_lists(value: object) -> object:
    """Convert tensors in a tuple, such as CLIP's statistics, to lists, which can be compared."""
    if isinstance(value, tuple):
        return tuple(map(_convert_tensors_to_lists, value))
    return value.tolist() if isinstance(value, Tensor) else value


def _iter_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
