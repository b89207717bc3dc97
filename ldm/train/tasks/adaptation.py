"""Training of small parts beside a frozen model: low-rank changes of its layers, words, or both.

    lightning:
      lora: {rank: 8, alpha: 8, targets: [transformer, text]}             see TARGETS
      textual_inversion: {token: <cat>, vectors: 2, init: cat}

The task stays `Diffusion`; only what is trained, and what is written in the end, is another.
Hu et al. 2021 (arXiv:2106.09685); Gal et al. 2022 (arXiv:2208.01618).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.encoders import tokenizer
from ldm.encoders.text import TextEncoder
from ldm.loading.addons.embeddings import write_embeddings
from ldm.loading.addons.lora import kohya_name, lora_targets, write_lora
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRA, LoRALayer
from ldm.train.tasks.diffusion import Diffusion

__all__ = ["TARGETS", "Adaptation"]

# Names for sets of layers, as patterns of diffusers' names of them.
TARGETS = {
    "attention": r"unet\..*\.attn[12]\..*",
    "transformer": r"unet\..*attentions\..*",  # what kohya's scripts train
    "convolutions": r"unet\..*(resnets|samplers)\.\d+\.conv.*",
    "text": r"text_encoder\.text_model\.encoder\..*",
}


class Adaptation:
    """A task whose model is frozen, and what is trained in its place.

        lora: {rank, alpha (the rank), targets}, or empty for none.
        textual_inversion: {token, vectors (1), init}, or empty for none. init: a word whose
            vectors are where it starts; none: the mean of all words. `settings` has checked both.
    Raises ValueError for a model that has no such layers, no text tower, or not the words of init.
    """

    def __init__(
        self, task: Diffusion, lora: Mapping[str, Any], textual_inversion: Mapping[str, Any]
    ) -> None:
        self.task, self.model = task, task.model
        self.model.requires_grad_(False).eval()
        self.trained = nn.ModuleDict()
        self.token: str | None = None
        if lora:
            self.trained["lora"] = adapter = _adapter(self.model, **lora)
            adapter.attach()
        if textual_inversion:
            self.trained["word"] = word = _word(self.model, **textual_inversion)
            self.token = textual_inversion["token"].lower()
            text = self.model.conditioner.get(TextEncoder)
            text.added_embeddings[self.token] = word.vectors
        self.is_heard = False

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """As `Diffusion.loss`.

        Raises ValueError if the word to be learned is in no caption of the first batch.
        """
        if self.token is not None and not self.is_heard:
            if not any(self.token in text.lower() for text in batch["txt"]):
                some = batch["txt"][0]
                raise ValueError(f"no caption has the word `{self.token}`, one is `{some}`")
            self.is_heard = True
        return self.task.loss(batch, generator)

    def export(self, path: Path, notes: Mapping[str, str | int]) -> None:
        """Writes what was learned: LoRA in kohya's format to `path`, in diffusers' beside it.

        A word goes to `path`, or beside it if there is a LoRA. notes: what the files say of it.
        """
        if "lora" in self.trained:
            adapter: Any = self.trained["lora"]
            low: Any = next(iter(adapter.values()))
            kohyas = {"ss_network_module": "networks.lora", "ss_network_dim": low.rank}
            kohyas["ss_network_alpha"] = float(low.alpha)
            write_lora(adapter, path, self.model, "kohya", {**notes, **kohyas})
            write_lora(adapter, _beside(path, "diffusers"), self.model, "diffusers", notes)
        if self.token is not None:
            to = _beside(path, "word") if "lora" in self.trained else path
            word: Any = self.trained["word"]
            write_embeddings(to, {self.token: word.vectors}, {**notes})


class Word(nn.Module):
    """The vectors (n, D) of a word that is learned."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone())


def _adapter(
    model: LatentDiffusion,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("transformer",),
) -> LoRA:
    patterns = [re.compile(TARGETS[target]) for target in targets]
    chosen = {
        kohya_name(name): LoRALayer(place, rank, alpha)
        for name, place in lora_targets(model).items()
        if any(pattern.fullmatch(name) for pattern in patterns)
    }
    if not chosen:
        raise ValueError(f"lightning.lora: the model has no layers of {', '.join(targets)}")
    return LoRA(chosen)


def _word(model: LatentDiffusion, *, token: str, vectors: int = 1, init: str | None = None) -> Word:
    text = model.conditioner.find(TextEncoder)
    if text is None:
        raise ValueError("lightning.textual_inversion: the model has no text tower")
    if init is None:
        start = text.token_embeddings().mean(0, keepdim=True)  # (1, D)
    else:
        _check_words(init, text.token_ids)
        start = text.token_embeddings(init)  # (n, D)
    return Word(start[torch.arange(vectors) % len(start)])


def _check_words(init: str, ids: Tensor | None) -> None:
    """Raises ValueError for words without tokens, or without those that a model knows.

    ids: the latter, of a compact vocabulary; None: all.
    """
    where = "lightning.textual_inversion.init"
    if not tokenizer.encode(init, tokenizer.OPEN_CLIP):
        raise ValueError(f"{where}: `{init}` has no words")
    if ids is None or ids.is_meta:
        return
    known = set(ids.tolist())
    lacking = [
        f"`{word}`"
        for word in init.split()
        if not known.issuperset(tokenizer.encode(word, tokenizer.OPEN_CLIP))
    ]
    if lacking:
        raise ValueError(f"{where}: the model's vocabulary lacks {', '.join(lacking)}")


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}-{name}{path.suffix}")
