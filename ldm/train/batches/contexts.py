"""Contexts of captions, made once by a frozen text tower and read many times (see `Store`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.train.batches.store import Store, digest, digest_of_weights

__all__ = ["Contexts", "cached_contexts"]


class Contexts(Mapping[str, Tensor]):
    """What a text tower makes of captions, (N, D) by text; only what is kept is in it."""

    def __init__(self, store: Store, recipe: str, texts: Iterable[str]) -> None:
        self.store = store
        self.keys_of = {text: digest(recipe, text) for text in texts}

    def __getitem__(self, text: str) -> Tensor:
        return self.store[self.keys_of[text]]["context"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


@torch.inference_mode()
def cached_contexts(
    model: LatentDiffusion, texts: Iterable[str], cache: Path, *, batch: int = 64
) -> Contexts:
    """The contexts of all texts by the model's text tower, those from the cache that are there.

    Raises ValueError if the tower is trained, so that contexts would be out of date.
    """
    tower = model.conditioner.find(TextEncoder)
    if tower is None or any(p.requires_grad for p in tower.parameters()):
        raise ValueError("data.params.texts: contexts can be kept only of a frozen text tower")
    recipe = digest(digest_of_weights(tower), [_options(module) for module in tower.modules()])
    contexts = Contexts(Store(cache, "contexts"), recipe, dict.fromkeys(["", *texts]))

    def make(some: Sequence[str]) -> tuple[list[int], dict[str, Tensor]]:
        context = tower.encode(list(some))  # (B, N, D)
        return list(range(len(some))), {"context": context.half()}

    wanted = [(key, text) for text, key in contexts.keys_of.items()]
    contexts.store.fill(wanted, make, batch=batch, unit="text")
    return contexts


def _options(module: Any) -> dict[str, Any]:
    """What a module was told, as far as it keeps it in plain values."""
    plain = (str, int, float, bool, tuple)
    told = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_"}
    return {"class": type(module).__name__, **told, "training": False}
