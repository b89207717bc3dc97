"""Training of a LoRA, a textual inversion, or both, for a frozen model.

    lightning:
      lora: {rank: 8, alpha: 8, targets: [transformer, text]}             see TARGET_PATTERNS
      textual_inversion: {token: <cat>, num_vectors: 2, initializer_words: cat}

Hu et al. 2021 (arXiv:2106.09685); Gal et al. 2022 (arXiv:2208.01618).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.encoders import tokenizer
from ldm.encoders.text import TextEncoder
from ldm.loading.addons.embeddings import write_embeddings
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRA, LoRALayer
from ldm.runtime.types import JsonMapping
from ldm.train.tasks.diffusion import DiffusionTask
from ldm.train.tasks.task import Batch, Losses, Task

__all__ = ["TARGET_PATTERNS", "AdaptationTask"]

# Sets of layers by name, as patterns of the layers' diffusers names.
TARGET_PATTERNS = {
    "attention": r"unet\..*\.attn[12]\..*",
    "transformer": r"unet\..*attentions\..*",  # the layers that kohya's scripts train
    "convolutions": r"unet\..*(resnets|samplers)\.\d+\.conv.*",
    "text": r"text_encoder(_2)?\.text_model\.encoder\..*",
}
INITIALIZER_KEY = "lightning.textual_inversion.initializer_words"


class AdaptationTask(Task):
    """Training of a LoRA and/or the embedding of a new token, with the loss of `DiffusionTask`.

    Args:
        task: Task whose loss is used; its model is frozen.
        lora: Fields of `config.schema.LoraOptions`; None = no LoRA.
        textual_inversion: Fields of `config.schema.TextualInversionOptions`; None = no textual
            inversion. Each text encoder has its own vectors, initially the embeddings of the words
            `initializer_words`, or the mean of all token embeddings.
    """

    def __init__(
        self, task: DiffusionTask, lora: JsonMapping | None, textual_inversion: JsonMapping | None
    ) -> None:
        self.task = task
        self.model: LatentDiffusion = task.model
        self.model.requires_grad_(False).eval()
        self.trainable = nn.ModuleDict()
        self.lora: LoRA | None = None
        # The embedding of the token for each text encoder, (n, D)
        self.vectors = nn.ParameterDict()
        self.token = ""
        self._has_checked_captions = False
        if lora:
            self.lora = _build_lora(self.model, **lora)
            self.lora.attach()
            self.trainable["lora"] = self.lora
        if textual_inversion:
            encoders = self.model.conditioner.find_all(TextEncoder)
            if not encoders:
                raise ValueError("lightning.textual_inversion: the model has no text encoder")
            self.token = textual_inversion["token"].lower()
            for index, encoder in enumerate(encoders):
                words = textual_inversion["initializer_words"]
                initial = _make_initial_vectors(encoder, words)  # (k, D)
                indices = torch.arange(textual_inversion["num_vectors"]) % len(initial)
                name = f"vectors_{index + 1}" if index else "vectors"
                self.vectors[name] = nn.Parameter(initial[indices])
            self.trainable["word"] = self.vectors  # its name in state files
            self.attach_vectors()

    def attach_vectors(self) -> None:
        """Add the token and its vectors to each text encoder."""
        encoders = self.model.conditioner.find_all(TextEncoder)
        for encoder, vectors in zip(encoders, self.vectors.values(), strict=True):
            encoder.added_embeddings[self.token] = vectors

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        is_training = torch.is_grad_enabled()
        if self.token and is_training and not self._has_checked_captions:
            captions = batch["txt"]
            if not any(self.token in caption.lower() for caption in captions):
                raise ValueError(
                    f"token `{self.token}` appears in no caption of the first batch, such as "
                    f"`{captions[0]}`"
                )
            self._has_checked_captions = True
        return self.task.loss(batch, generator)

    def get_weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        return self.task.get_weights_to_export(images)

    def write(self, path: Path, metadata: Mapping[str, str | int]) -> None:
        """Write the LoRA and the embedding.

        A LoRA is written to PATH in kohya's format, and to PATH-diffusers in diffusers' format. The
        embedding is written to PATH, or to PATH-word if there is a LoRA.
        """
        if self.lora is not None:
            write_lora(self.lora, path, self.model, "kohya", metadata)
            diffusers_path = _add_to_stem(path, "diffusers")
            write_lora(self.lora, diffusers_path, self.model, "diffusers", metadata)
        if self.token:
            embedding_path = path if self.lora is None else _add_to_stem(path, "word")
            vectors = list(self.vectors.values())
            write_embeddings(embedding_path, {self.token: vectors}, metadata, self.model)


def _build_lora(
    model: LatentDiffusion, *, rank: int, alpha: float | None, targets: Sequence[str]
) -> LoRA:
    patterns = [re.compile(TARGET_PATTERNS[target]) for target in targets]
    layers = {
        layer.kohya_name: LoRALayer(layer.target, rank, alpha)
        for layer in list_lora_targets(model)
        if any(pattern.fullmatch(layer.diffusers_name) for pattern in patterns)
    }
    if not layers:
        raise ValueError(f"lightning.lora.targets: the model has no {', '.join(targets)} layers")
    return LoRA(layers)


def _make_initial_vectors(encoder: TextEncoder, words: str | None) -> Tensor:
    """Return the vectors (k, D) of the tokens of `words`, or (1, D), the mean of all tokens."""
    if words is None:
        return encoder.get_token_embeddings().mean(0, keepdim=True)
    if not tokenizer.encode(words, tokenizer.OPEN_CLIP):
        raise ValueError(f"{INITIALIZER_KEY}: `{words}` has no words")
    if encoder.token_ids is not None and not encoder.token_ids.is_meta:
        vocabulary = set(encoder.token_ids.tolist())
        missing = [
            f"`{word}`"
            for word in words.split()
            if not vocabulary.issuperset(tokenizer.encode(word, tokenizer.OPEN_CLIP))
        ]
        if missing:
            names = ", ".join(missing)
            raise ValueError(f"{INITIALIZER_KEY}: not in the model's vocabulary: {names}")
    return encoder.get_token_embeddings(words)


def _add_to_stem(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}-{name}{path.suffix}")
