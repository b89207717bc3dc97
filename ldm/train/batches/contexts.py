"""Cached contexts of captions, computed once by a frozen text encoder (see `Store`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.train.batches.store import Store, digest, digest_of_weights

__all__ = ["CachedContexts", "cache_contexts"]


class CachedContexts(Mapping[str, Tensor]):
    """Contexts (N, D) by caption; only cached ones are in it.

    Args:
        encoder_digest: of the encoder's weights and options.
    """

    def __init__(self, store: Store, encoder_digest: str, captions: Iterable[str]) -> None:
        self.store = store
        self.keys_of = {caption: digest(encoder_digest, caption) for caption in captions}

    def __getitem__(self, caption: str) -> Tensor:
        return self.store[self.keys_of[caption]]["context"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


@torch.inference_mode()
def cache_contexts(
    model: LatentDiffusion, captions: Iterable[str], cache: Path, *, batch: int = 64
) -> CachedContexts:
    """Computes the contexts that the cache does not have: of captions and of the empty one.

    Args:
        cache: folder of the cache files.
        batch: captions encoded at once.
    Raises:
        ValueError: the model has no text encoder, or it is trained.
    """
    encoder = model.conditioner.find(TextEncoder)
    if encoder is None or any(p.requires_grad for p in encoder.parameters()):
        raise ValueError("data.params.texts: only contexts of a frozen text encoder can be cached")
    contexts = CachedContexts(
        Store(cache, "contexts"), digest_encoder(encoder), dict.fromkeys(["", *captions])
    )

    def encode(batch: Sequence[str]) -> tuple[Sequence[int], dict[str, Tensor]]:
        context = encoder.encode(batch)  # (B, N, D)
        return range(len(batch)), {"context": context.half()}

    items = [(key, caption) for caption, key in contexts.keys_of.items()]
    contexts.store.fill(items, encode, batch_size=batch, unit="caption")
    return contexts


def digest_encoder(encoder: TextEncoder) -> str:
    """Digest of the weights and options of an encoder."""
    options = [_plain_options(module) for module in encoder.modules()]
    return digest(digest_of_weights(encoder), options)


def _plain_options(module: nn.Module) -> dict[str, object]:
    """Class and options of a module, as far as its attributes have them in plain values."""
    plain = (str, int, float, bool, tuple)
    options = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_"}
    return {"class": type(module).__name__, **options, "training": False}
