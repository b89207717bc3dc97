"""Pool: models that stay in memory, with the parts that they have in common there once."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.encoders.text import TextEncoder
from ldm.loading.load import load
from ldm.model import LatentDiffusion

__all__ = ["Pool"]

PLAIN = (bool, int, float, str, tuple, list, type(None))


class Pool:
    """Called like `load`, whose models it keeps; asked again for one, it is given at once.

        limit: bytes that the models together may take; the one that was used longest ago goes
            first, before another is loaded. A model that is larger is loaded alone.
        load: what makes the models.

    Two models whose text towers, autoencoders … were built alike and hold equal weights share them.
    """

    def __init__(self, limit: float, load: Callable[..., LatentDiffusion] = load) -> None:
        self.limit = limit
        self._load = load
        self._models: dict[object, LatentDiffusion] = {}  # the last used last

    def __call__(self, config: Any = None, ckpt: Any = None, **options: Any) -> LatentDiffusion:
        """The model; arguments as `load`. A file that has changed since is loaded anew."""
        beside = [*(file for file, _ in options.get("loras", ())), *options.get("embeddings", ())]
        states = tuple(map(_state, (ckpt, *beside)))
        key = (str(config), states, repr(sorted(options.items())))
        if key in self._models:
            self._models[key] = self._models.pop(key)
            return self._models[key]
        coming = Path(ckpt).expanduser().stat().st_size if ckpt else 0
        while self._models and self.nbytes + coming > self.limit:
            self._models.pop(next(iter(self._models)))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model = self._load(config, ckpt, **options)
        for other in self._models.values():
            _share(model, other)
        self._models[key] = model
        return model

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self._models)

    @property
    def nbytes(self) -> int:
        """What all models take together; a tensor that several have counts once."""
        tensors = (t for model in self._models.values() for t in _tensors(model))
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _share(model: LatentDiffusion, other: LatentDiffusion) -> None:
    """Puts parts of another model in the place of equal ones."""
    theirs = dict(other.conditioner.named_children())
    for name, part in list(model.conditioner.named_children()):
        if name in theirs and _equal(part, theirs[name]):
            model.conditioner.add_module(name, theirs[name])
    if _equal(model.autoencoder, other.autoencoder):
        model.autoencoder = other.autoencoder


def _equal(one: nn.Module, two: nn.Module) -> bool:
    """Whether two modules were built alike and hold the same values, in the same place."""
    if one is two or [_look(m) for m in one.modules()] != [_look(m) for m in two.modules()]:
        return one is two
    pairs = list(zip(_tensors(one), _tensors(two), strict=True))
    if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
        return False
    return all(torch.equal(a, b) for a, b in pairs)


def _look(module: nn.Module) -> tuple[type, dict[str, Any], list[str]]:
    """Class, settings and names of a module, but no weights."""
    settings: dict[str, Any] = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, PLAIN) or inspect.isroutine(value)
    }
    if isinstance(module, TextEncoder):  # textual inversions are not among the weights
        settings["added"] = {t: v.tolist() for t, v in module.added_embeddings.items()}
    names = [*module._parameters, *module._buffers]
    return type(module), settings, names


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _state(path: Any) -> Any:
    """A file, or all of a folder, as it is now."""
    if path is None:
        return None
    file = Path(path).expanduser()
    if file.is_dir():
        return tuple(_state(inside) for inside in sorted(file.iterdir()) if inside.is_file())
    status = file.stat()
    return str(file.resolve()), status.st_size, status.st_mtime_ns
