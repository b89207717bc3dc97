"""CLIP's text model and tokenizer, with the interfaces of transformers, but without its code.

The network is `ldm.encoders.towers.CLIPTower` with layers of torch's own classes.
"""

import json
from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm.compat.class_swap import swap_classes
from ldm.encoders import tokenizer
from ldm.encoders.text import CLIP_CONFIGS, CLIP_LARGE_CONFIG, CLIPText
from ldm.encoders.towers import select_tokens
from ldm.loading.files.checkpoint import read_checkpoint

WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
INITIALIZER_STD = 0.02  # of the embeddings of added tokens, as in CLIP's initialization


class TextOutput(NamedTuple):
    """Output of the text model.

    Attributes:
        last_hidden_state: (B, N, D), after the final norm.
        pooler_output: Last hidden state at the first EOS token, (B, D); None without token ids.
        hidden_states: The embedding and the output of each layer, (B, N, D), before the final norm;
            None without `output_hidden_states`.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPTextEmbeddings(nn.Module):
    """Token ids (B, N) -> sum of token and position embedding (B, N, D)."""

    token_embedding: nn.Module  # third-party code replaces it by its own module
    position_embedding: nn.Embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        embedding_manager: Any = None,
    ) -> Tensor:
        """Embed token ids.

        Args:
            position_ids: (B, N); None = 0 … N-1.
            inputs_embeds: Token embeddings (B, N, D); None to compute them from `input_ids`.
            embedding_manager: Textual inversion, (token ids, token embeddings) -> token
                embeddings; None = no textual inversion.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("`input_ids` or `inputs_embeds` is needed")
            inputs_embeds = cast(Tensor, self.token_embedding(input_ids))
        if embedding_manager is not None:
            inputs_embeds = cast(Tensor, embedding_manager(input_ids, inputs_embeds))
        if position_ids is None:
            positions: Tensor = self.position_embedding.weight[: inputs_embeds.shape[1]]
        else:
            positions = self.position_embedding(position_ids)
        return inputs_embeds + positions

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "position_ids", None)  # in checkpoints, not a buffer here
        super()._load_from_state_dict(state_dict, prefix, *args)


class CLIPEncoder(nn.Module):
    """The layers of the text model, with causal attention."""

    layers: nn.ModuleList

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | int | None = False,
        **ignored: Any,
    ) -> TextOutput:
        """Run the layers on embeddings (B, N, D).

        Args:
            attention_mask: Tokens to attend to, (B, N), 1 = keep; None keeps all.
        """
        x, n = inputs_embeds, inputs_embeds.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask.to(x.device).bool()[:, None, None]
        hidden_states = [x]
        for layer in self.layers:
            x = layer(x, mask)
            hidden_states.append(x)
        return TextOutput(x, hidden_states=tuple(hidden_states) if output_hidden_states else None)


class CLIPTextTransformer(nn.Module):
    """Embedding, layers and final norm."""

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
        """Encode token ids (B, N), N <= 77, of any integer type.

        Args:
            output_attentions, return_dict: Ignored. The others: see `CLIPTextEmbeddings.forward`
                and `CLIPEncoder.forward`.
        """
        if input_ids is not None:
            input_ids = input_ids.reshape(-1, input_ids.shape[-1])
        x = self.embeddings(input_ids, position_ids, inputs_embeds, embedding_manager)
        outputs = self.encoder(x, attention_mask, output_hidden_states=output_hidden_states)
        x = self.final_layer_norm(outputs.last_hidden_state)
        pooled = None
        if input_ids is not None:
            eos_positions = (input_ids == tokenizer.EOS_ID).int().argmax(dim=1)  # of the first EOS
            pooled = select_tokens(x, eos_positions.to(x.device))
        return TextOutput(x, pooled, outputs.hidden_states)


class CLIPTextModel(nn.Module):
    """The text model of SD 1, with parameter names as in its checkpoints.

    Args:
        config: Name of a model, a folder with its `config.json`, or the contents of that file.
    """

    def __init__(self, config: str | Path | Mapping[str, Any]) -> None:
        super().__init__()
        config_dict = _read_config(config)
        tower = CLIPText(arch=config_dict, freeze=False).tower
        tower.embeddings.__class__ = CLIPTextEmbeddings  # type: ignore[assignment]
        tower.encoder.__class__ = CLIPEncoder  # type: ignore[assignment]
        tower.__class__ = CLIPTextTransformer  # type: ignore[assignment]
        self.text_model = cast(CLIPTextTransformer, swap_classes(tower))
        self.config = SimpleNamespace(**config_dict)
        self.name_or_path = str(config) if isinstance(config, (str, Path)) else ""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None,
        *args: Any,
        config: Any = None,
        **ignored: Any,
    ) -> "CLIPTextModel":
        """Build the model; its weights are random unless `name` is a folder that has them.

        Args:
            name: See `config` of the constructor; may be None if `config` is given.
            config: Config to use instead of that of `name`; None = that of `name`.
        """
        source = config or name
        if source is None:
            raise ValueError("a name or a config is needed")
        model = cls(source)
        paths = [] if name is None else [Path(name, file_name) for file_name in WEIGHTS_NAMES]
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            state_dict, prefix = read_checkpoint(path).state_dict, "text_model."
            if "final_layer_norm.weight" in state_dict:  # as transformers 5 names them
                state_dict = {f"{prefix}{name}": value for name, value in state_dict.items()}
            model.load_state_dict({k: v for k, v in state_dict.items() if k.startswith(prefix)})
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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *ignored: Any
    ) -> nn.Module:
        """Resize the token embedding to `new_num_tokens`; new rows are random; None = no change."""
        old = cast(nn.Embedding, self.get_input_embeddings())
        if new_num_tokens is None or new_num_tokens == old.num_embeddings:
            return old
        new = nn.Embedding(new_num_tokens, old.embedding_dim).to(old.weight)
        num_kept = min(new_num_tokens, old.num_embeddings)
        with torch.no_grad():
            new.weight.normal_(std=INITIALIZER_STD)[:num_kept] = old.weight[:num_kept]
        new.weight.requires_grad = old.weight.requires_grad
        self.set_input_embeddings(new)
        self.config.vocab_size = new_num_tokens
        return new

    def forward(self, *args: Any, **kwargs: Any) -> TextOutput:
        """Run the text model, see `CLIPTextTransformer.forward`."""
        output: TextOutput = self.text_model(*args, **kwargs)
        return output


class BatchEncoding(UserDict[str, Any]):
    """Output of the tokenizer: a dict whose values are also attributes."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class CLIPTokenizer:
    """Byte-level BPE of SD 1, equal to transformers' slow tokenizer with ftfy.

    Args:
        max_length: Default of `max_length` in `__call__`.
    """

    bos_token, eos_token = tokenizer.CLIP.bos, tokenizer.CLIP.eos
    pad_token = unk_token = tokenizer.CLIP.eos
    bos_token_id, eos_token_id = tokenizer.BOS_ID, tokenizer.EOS_ID
    pad_token_id = unk_token_id = tokenizer.EOS_ID
    vocab_size = tokenizer.EOS_ID + 1

    def __init__(self, max_length: int = 77) -> None:
        self.model_max_length = max_length
        self.added_tokens_encoder: dict[str, int] = {}

    @classmethod
    def from_pretrained(cls, *args: Any, **ignored: Any) -> "CLIPTokenizer":
        """Build the tokenizer, which is the same for all of OpenAI's CLIP models."""
        return cls()

    def __len__(self) -> int:
        return self.vocab_size + len(self.added_tokens_encoder)

    def get_vocab(self) -> dict[str, int]:
        """Return ids by token; `</w>` marks the end of a word."""
        vocabulary, _ = tokenizer.load_vocabulary()
        special_tokens = {self.bos_token: self.bos_token_id, self.eos_token: self.eos_token_id}
        return {**vocabulary, **special_tokens, **self.added_tokens_encoder}

    encoder = property(get_vocab)

    def add_tokens(self, tokens: str | Sequence[str], special_tokens: bool = False) -> int:
        """Add tokens to the vocabulary; return the number of new tokens."""
        num_before, vocabulary = len(self), self.get_vocab()
        for token in [tokens] if isinstance(tokens, str) else tokens:
            if token not in vocabulary and token not in self.added_tokens_encoder:
                self.added_tokens_encoder[token] = len(self)
        return len(self) - num_before

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or the list of ids of several."""
        vocabulary = self.get_vocab()
        if isinstance(tokens, str):
            return vocabulary.get(tokens, self.unk_token_id)
        return [vocabulary.get(token, self.unk_token_id) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | Tensor) -> Any:
        """Return the token of an id, or the list of tokens of several."""
        tokens = {token_id: token for token, token_id in self.get_vocab().items()}
        return tokens[ids] if isinstance(ids, int) else [tokens[int(token_id)] for token_id in ids]

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
        """Convert texts to `input_ids` and `attention_mask`.

        Args:
            padding: "max_length", or True to pad to the longest text.
            truncation: Whether to truncate texts to `max_length` tokens.
            max_length: Number of tokens; None = `model_max_length`.
            add_special_tokens: Whether to add BOS and EOS token.
            return_tensors: "pt" for tensors (B, N); None = lists.
            return_length: Whether to add `length`, the lengths including padding.
            ignored: Other keyword arguments of transformers.
        """
        max_length = self.model_max_length if max_length is None else max_length
        num_special_tokens = 2 if add_special_tokens else 0
        sequences = []
        for ids in map(self._encode_text, [text] if isinstance(text, str) else text):
            if truncation:
                ids = ids[: max(max_length - num_special_tokens, 0)]
            if add_special_tokens:
                ids = [self.bos_token_id, *ids, self.eos_token_id]
            sequences.append(ids)
        lengths = [len(ids) for ids in sequences]
        padded_length = 0
        if padding:
            padded_length = max_length if padding == "max_length" else max(lengths, default=0)
        padded = [ids + [self.pad_token_id] * (padded_length - len(ids)) for ids in sequences]
        mask = [[1] * length + [0] * (padded_length - length) for length in lengths]
        data: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
        if return_length:
            data["length"] = [len(ids) for ids in padded]
        if return_tensors == "pt":
            data = {name: torch.tensor(value, device="cpu") for name, value in data.items()}
        elif return_tensors is not None:
            raise ValueError(f'return_tensors must be "pt" or None, got "{return_tensors}"')
        elif isinstance(text, str):
            data = {name: value[0] for name, value in data.items()}
        return BatchEncoding(data)

    def _encode_text(self, text: str) -> list[int]:
        added = {token.lower(): [token_id] for token, token_id in self.added_tokens_encoder.items()}
        return tokenizer.encode(text, tokenizer.CLIP, added)


def _read_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a text model: the keys of CLIP_LARGE_CONFIG, which are transformers'."""
    if isinstance(config, Mapping):
        config_dict = config
    elif (path := Path(config, "config.json")).is_file():
        config_dict = json.loads(path.read_text("utf-8"))
    else:
        config_dict = CLIP_CONFIGS.get(str(config), {})
    config_dict = config_dict.get("text_config", config_dict)
    return CLIP_LARGE_CONFIG | {
        key: config_dict[key] for key in CLIP_LARGE_CONFIG.keys() & config_dict.keys()
    }
