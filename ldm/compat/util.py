"""`ldm.util` of the original: objects from configs, predicates, captions as images."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from inspect import isfunction
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

log = logging.getLogger(__name__)


def instantiate_from_config(config: Mapping[str, Any] | str, **kwargs: Any) -> Any:
    """Import and call the class or function `config["target"]`.

    Use this function only for configs that you trust as much as a program: unlike
    `ldm.instantiate`, it allows any target.

    Args:
        config: A mapping or a node of OmegaConf; its `params` are the keyword arguments. The
            strings "__is_first_stage__" and "__is_unconditional__" give None.
        kwargs: Additional keyword arguments.
    """
    if "target" not in config:
        if config in ("__is_first_stage__", "__is_unconditional__"):
            return None
        raise KeyError("Expected key `target` to instantiate.")
    assert not isinstance(config, str)
    # An empty `params:` in a YAML file is None.
    return get_obj_from_str(config["target"])(**(config.get("params") or {}), **kwargs)


def to_builtin(value: Any) -> Any:
    """Convert nested mappings and sequences, such as OmegaConf's, to dicts and lists."""
    if isinstance(value, Mapping):
        return {key: to_builtin(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_builtin(item) for item in value]
    return value


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import an object by its dotted name; `reload` reloads its module first."""
    module, _, name = string.rpartition(".")
    if reload:
        importlib.reload(importlib.import_module(module))
    return getattr(importlib.import_module(module), name)


def exists(x: object) -> bool:
    """Return whether x is not None."""
    return x is not None


def default(val: Any, d: Any) -> Any:
    """Return val, or d if val is None; a plain function d is called, a class is not."""
    if val is not None:
        return val
    return d() if isfunction(d) else d


def ismap(x: object) -> bool:
    """Return whether x is a tensor (B, C, h, w) with more than 3 channels."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: object) -> bool:
    """Return whether x is a tensor (B, C, h, w) of 1 or 3 channels."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    """Return the mean over all dimensions but the first."""
    return tensor.mean(dim=tuple(range(1, tensor.ndim)))


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Return the number of parameters of a model."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if verbose:
        log.info("%s has %.2f M params.", type(model).__name__, count * 1e-6)
    return count


def log_txt_as_img(wh: Sequence[int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Draw captions in black on white.

    Args:
        wh: Width and height of each image.
        xc: B captions, split into lines of int(40 * width / 256) characters.
        size: Font size in pixels.

    Returns:
        (B, 3, height, width) float64 in [-1, 1].
    """
    width, height = wh
    line_length = int(40 * width / 256)
    font = ImageFont.load_default(size)
    images = []
    for caption in xc:
        image = Image.new("RGB", (width, height), color="white")
        lines = [caption[i : i + line_length] for i in range(0, len(caption), line_length)]
        ImageDraw.Draw(image).text((0, 0), "\n".join(lines), fill="black", font=font)
        images.append(np.array(image).transpose(2, 0, 1) / 127.5 - 1.0)
    return torch.tensor(np.stack(images))


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Return the module unchanged; this replaces the method `train` of frozen modules."""
    return self
