"""CLIP's text model and tokenizer, called as those of transformers; that is not needed.

The network is `ldm.encoders.towers.CLIPTower`, its layers are torch's own classes.
"""

import json
from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm.compat.relabel import relabel
from ldm.encoders import tokenizer
from ldm.encoders.text import CLIP_LARGE, CLIP_SIZES, CLIPText
from ldm.encoders.towers import select_tokens
from ldm.loading.files.checkpoint import read_checkpoint

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
NEW_TOKEN_STD = 0.02


class TextOutput(NamedTuple):
    """Output of the text model.

    Attributes:
        last_hidden_state: (B, N, D), after the final norm.
        pooler_output: The vectors at the first end tokens, (B, D).
        hidden_states: The embedding and the output of each block, before the final norm.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPTextEmbeddings(nn.Module):
    """Token ids (B, N) -> sum of token and position embedding (B, N, D)."""

    token_embedding: nn.Module  # programs put a module of their own here
    position_embedding: nn.Embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        embedding_manager: Any = None,
    ) -> Tensor:
        """Embed token ids, or add the positions to `inputs_embeds` (B, N, D).

        Args:
            embedding_manager: Textual inversion: called with ids and token embeddings, it gives
                other embeddings.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("either `input_ids` or `inputs_embeds` is needed")
            inputs_embeds = cast(Tensor, self.token_embedding(input_ids))
        if embedding_manager is not None:
            inputs_embeds = cast(Tensor, embedding_manager(input_ids, inputs_embeds))
        if position_ids is None:
            positions: Tensor = self.position_embedding.weight[: inputs_embeds.shape[1]]
        else:
            positions = self.position_embedding(position_ids)
        return inputs_embeds + positions

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "position_ids", None)  # in checkpoints, but not in the model
        super()._load_from_state_dict(state_dict, prefix, *args)


class CLIPEncoder(nn.Module):
    """The blocks of the text model; a token attends to itself and to those before it."""

    layers: nn.ModuleList

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | int | None = False,
        **ignored: Any,
    ) -> TextOutput:
        """Run the blocks on (B, N, D).

        Args:
            attention_mask: Tokens to attend to, (B, N), 1 = keep.
        """
        x, n = inputs_embeds, inputs_embeds.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask.to(x.device).bool()[:, None, None]
        states = [x]
        for block in self.layers:
            x = block(x, mask)
            states.append(x)
        return TextOutput(x, hidden_states=tuple(states) if output_hidden_states else None)


class CLIPTextTransformer(nn.Module):
    """Embedding, blocks and final norm."""

    embeddings: CLIPTextEmbeddings
    encoder: CLIPEncoder
    final_layer_norm: nn.LayerNorm

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        embedding_manager: Any = None,
    ) -> TextOutput:
        """Encode token ids (B, N), N <= 77, of any integer type."""
        if input_ids is not None:
            input_ids = input_ids.reshape(-1, input_ids.shape[-1])
        x = self.embeddings(input_ids, position_ids, inputs_embeds, embedding_manager)
        x, _, states = self.encoder(x, attention_mask, output_hidden_states=output_hidden_states)
        x = self.final_layer_norm(x)
        pooled = None
        if input_ids is not None:
            ends = (input_ids == tokenizer.END).int().argmax(dim=1).to(x.device)  # the first
            pooled = select_tokens(x, ends)
        return TextOutput(x, pooled, states)


class CLIPTextModel(nn.Module):
    """The text model of SD 1; names of parameters as in its checkpoints.

    Args:
        config: Name of a model, a folder with its `config.json`, or the entries of that.
    """

    def __init__(self, config: str | Path | Mapping[str, Any]) -> None:
        super().__init__()
        sizes = _read_sizes(config)
        tower = CLIPText(arch=sizes, freeze=False).tower
        tower.embeddings.__class__ = CLIPTextEmbeddings  # type: ignore[assignment]
        tower.encoder.__class__ = CLIPEncoder  # type: ignore[assignment]
        tower.__class__ = CLIPTextTransformer  # type: ignore[assignment]
        self.text_model = cast(CLIPTextTransformer, relabel(tower))
        self.config = SimpleNamespace(**sizes)
        self.name_or_path = str(config) if isinstance(config, (str, Path)) else ""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None,
        *args: Any,
        config: Any = None,
        **ignored: Any,
    ) -> "CLIPTextModel":
        """Build the model; its weights are random unless `name` is a folder that holds them.

        Args:
            config: Overrides the name.
        """
        source = config or name
        if source is None:
            raise ValueError("a name or a config is needed")
        model = cls(source)
        folders = [] if name is None else [Path(name)]
        files = [folder / file for folder in folders for file in WEIGHT_FILES]
        path = next((path for path in files if path.is_file()), None)
        if path is not None:
            state = read_checkpoint(path).state
            text = {key: value for key, value in state.items() if key.startswith("text_model.")}
            model.load_state_dict(text)
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self.text_model.final_layer_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.final_layer_norm.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = embedding

    def resize_token_embeddings(self, count: int | None = None, *ignored: Any) -> nn.Module:
        """Give the token embedding `count` rows; new rows are random."""
        old = cast(nn.Embedding, self.get_input_embeddings())
        if count is None or count == old.num_embeddings:
            return old
        new = nn.Embedding(count, old.embedding_dim).to(old.weight)
        shared = min(count, old.num_embeddings)
        with torch.no_grad():
            new.weight.normal_(std=NEW_TOKEN_STD)[:shared] = old.weight[:shared]
        new.weight.requires_grad = old.weight.requires_grad
        self.set_input_embeddings(new)
        self.config.vocab_size = count
        return new

    def forward(self, *args: Any, **kwargs: Any) -> TextOutput:
        """Run the text model, see `CLIPTextTransformer.forward`."""
        output: TextOutput = self.text_model(*args, **kwargs)
        return output


class BatchEncoding(UserDict[str, Any]):
    """Result of the tokenizer: entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class CLIPTokenizer:
    """Byte-level BPE of SD 1, as transformers' slow tokenizer with ftfy.

    Args:
        max_length: Length of `truncation` and `padding` where a call names none.
    """

    bos_token, eos_token = tokenizer.CLIP.start, tokenizer.CLIP.end
    pad_token = unk_token = tokenizer.CLIP.end
    bos_token_id, eos_token_id = tokenizer.START, tokenizer.END
    pad_token_id = unk_token_id = tokenizer.END
    vocab_size = tokenizer.END + 1

    def __init__(self, max_length: int = 77) -> None:
        self.model_max_length = max_length
        self.added_tokens_encoder: dict[str, int] = {}

    @classmethod
    def from_pretrained(cls, *args: Any, **ignored: Any) -> "CLIPTokenizer":
        """Build the tokenizer: all CLIP models of OpenAI have the same."""
        return cls()

    def __len__(self) -> int:
        return self.vocab_size + len(self.added_tokens_encoder)

    def get_vocab(self) -> dict[str, int]:
        """Return ids by symbol; `</w>` is the end of a word."""
        symbols, _ = tokenizer.load_vocabulary()
        specials = {self.bos_token: self.bos_token_id, self.eos_token: self.eos_token_id}
        return {**symbols, **specials, **self.added_tokens_encoder}

    @property
    def encoder(self) -> dict[str, int]:
        return self.get_vocab()

    def add_tokens(self, tokens: str | Sequence[str], special_tokens: bool = False) -> int:
        """Add tokens that a prompt may contain; returns how many are new."""
        before, vocabulary = len(self), self.get_vocab()
        for token in [tokens] if isinstance(tokens, str) else tokens:
            if token not in vocabulary and token not in self.added_tokens_encoder:
                self.added_tokens_encoder[token] = len(self)
        return len(self) - before

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a symbol, or those of several."""
        vocabulary = self.get_vocab()
        if isinstance(tokens, str):
            return vocabulary.get(tokens, self.unk_token_id)
        return [vocabulary.get(token, self.unk_token_id) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | Tensor) -> Any:
        """Return the symbol of an id, or those of several."""
        symbols = {number: symbol for symbol, number in self.get_vocab().items()}
        if isinstance(ids, int):
            return symbols[ids]
        return [symbols[int(number)] for number in ids]

    def encode(self, text: str, **options: Any) -> Any:
        """Convert one text to ids, see `__call__`."""
        return self(text, **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_length: bool = False,
        **ignored: Any,
    ) -> BatchEncoding:
        """Convert texts to `input_ids` and `attention_mask`: lists, or with "pt" tensors (B, N).

        Args:
            padding: "max_length", or True for the longest.
            add_special_tokens: Whether start and end token are added.
            return_length: Whether there is an entry `length`, the lengths with padding.
        """
        limit = self.model_max_length if max_length is None else max_length
        edges = 2 if add_special_tokens else 0
        rows = []
        for words in map(self._words, [text] if isinstance(text, str) else text):
            if truncation:
                words = words[: max(limit - edges, 0)]
            if add_special_tokens:
                words = [self.bos_token_id, *words, self.eos_token_id]
            rows.append(words)
        lengths = [len(row) for row in rows]
        full = limit if padding == "max_length" else max(lengths, default=0) if padding else 0
        ids = [row + [self.pad_token_id] * (full - len(row)) for row in rows]
        mask = [[1] * n + [0] * (full - n) for n in lengths]
        entries: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if return_length:
            entries["length"] = [len(row) for row in ids]
        if return_tensors == "pt":
            entries = {name: torch.tensor(value, device="cpu") for name, value in entries.items()}
        elif return_tensors is not None:
            raise ValueError(f'return_tensors must be "pt" or None, got "{return_tensors}"')
        elif isinstance(text, str):
            entries = {name: value[0] for name, value in entries.items()}
        return BatchEncoding(entries)

    def _words(self, text: str) -> list[int]:
        added = {token.lower(): [number] for token, number in self.added_tokens_encoder.items()}
        return tokenizer.encode(text, tokenizer.CLIP, added)


def _read_sizes(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' names and values of the sizes of a text model."""
    if isinstance(config, Mapping):
        entries = config
    elif (path := Path(config, "config.json")).is_file():
        entries = json.loads(path.read_text("utf-8"))
    else:
        entries = CLIP_SIZES.get(str(config), {})
    entries = entries.get("text_config", entries)
    return CLIP_LARGE | {key: entries[key] for key in CLIP_LARGE.keys() & entries.keys()}
