"""Load TAESD, for decoding or previews, in the formats of its authors and of diffusers.

taesd_decoder.pth, taesd_encoder.pth    1.weight, 3.conv.0.weight, …
one file                                encoder.0.weight, decoder.1.weight, …
diffusers                               encoder.layers.0.weight, decoder.layers.0.weight, …
"""

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.loading.autoencoders import SDXL_PATTERN, SDXL_SCALE_FACTOR
from ldm.loading.build import fill_weights, meta_device
from ldm.loading.diffusers.files import read_component_state
from ldm.loading.diffusers.layout import read_json
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.matching import check_weights
from ldm.loading.published import resolve_checkpoint
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import Autoencoder
from ldm.nets.tiny_autoencoder import TinyAutoencoder
from ldm.pipelines.families import check_model, is_sdxl, quote_name
from ldm.runtime.errors import ArgumentError, WeightsMismatch

__all__ = [
    "TinyWeights", "build_tiny_autoencoder", "check_latents", "is_for_sdxl", "load_preview",
    "read_tiny_autoencoder",
]  # fmt: skip

log = logging.getLogger(__name__)

LAYER_NAME = re.compile(
    r"(?:\w*?(?P<network>encoder|decoder)\.)?(?P<diffusers>layers\.)?(?P<layer>\d+)"
    r"(?P<rest>(?:\.conv\.[024])?\.(?:weight|bias))"
)
CLASS_NAME = "AutoencoderTiny"  # in diffusers' config


@dataclass(frozen=True)
class TinyWeights:
    """The weights of TAESD.

    Args:
        state_dict: Weights under the names of `TinyAutoencoder`.
    """

    path: Path
    state_dict: dict[str, Tensor]

    @property
    def has_encoder(self) -> bool:
        """Whether the weights include the encoder."""
        return any(name.startswith("encoder.") for name in self.state_dict)


def read_tiny_autoencoder(path: str | Path) -> TinyWeights | None:
    """Return the weights of TAESD in a file or diffusers folder; None if it is something else.

    Raises:
        WeightsMismatch: The file contains only the encoder.
    """
    path = resolve_checkpoint(path)
    config = path / "config.json"
    if path.is_dir():
        if not config.is_file() or read_json(config).get("_class_name") != CLASS_NAME:
            return None
        state = read_component_state(path, None)
    else:
        state = read_checkpoint(path).state_dict
    if not all(map(LAYER_NAME.fullmatch, state)) or not any(".conv.0." in name for name in state):
        return None
    network = "encoder" if "0.weight" in state else "decoder"
    weights = TinyWeights(path, {_to_our_name(name, network): v for name, v in state.items()})
    if not any(name.startswith("decoder.") for name in weights.state_dict):
        raise WeightsMismatch(f"`{path}` is only the encoder of TAESD: pass the decoder")
    return weights


def build_tiny_autoencoder(
    weights: TinyWeights, model: LatentDiffusion, device: str | torch.device, dtype: torch.dtype
) -> TinyAutoencoder:
    """Build TAESD for the latents of a model; without an encoder it uses the model's encoder."""
    # If latents are normalized per channel, the model's factor is not the autoencoder's.
    scale_factor = SDXL_SCALE_FACTOR if model.latent_mean is not None else model.scale_factor
    with meta_device():
        tiny = TinyAutoencoder(scale_factor)
    expected = tiny.state_dict()
    if not weights.has_encoder:
        expected = {name: v for name, v in expected.items() if name.startswith("decoder.")}
        tiny.encoder = None
    check_weights(
        expected, weights.state_dict, f"`{weights.path}` is not TAESD with 4 latent channels"
    )
    fill_weights(tiny, dict(weights.state_dict), device=device, dtype=dtype)
    if not weights.has_encoder and isinstance(model.autoencoder, Autoencoder):
        tiny.fallback_encoder = model.autoencoder
    return tiny.eval()


def load_preview(path: str | Path, model: LatentDiffusion) -> Callable[[Tensor], Tensor]:
    """Load TAESD as a decoder for previews of the denoised latents that a callback receives.

    Returns:
        A function that decodes latents (B, 4, h, w) to images (B, 3, 8 h, 8 w) in [-1, 1].

    Raises:
        WeightsMismatch: The file is not TAESD, or does not fit the model.
    """
    check_model(model)
    if not isinstance(path, str | Path):
        raise ArgumentError(f"path must be a path, got {path!r}", "path")
    weights = read_tiny_autoencoder(path)
    if weights is None:
        raise WeightsMismatch(f"`{path}` is not TAESD, the small autoencoder of previews")
    check_latents(weights, model)
    tiny = build_tiny_autoencoder(weights, model, model.device, model.dtype)

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        return tiny.decode(model.denormalize(z)).clamp(-1, 1)

    return decode


def check_latents(weights: TinyWeights, model: LatentDiffusion) -> None:
    """Raise WeightsMismatch if the model's latents have another shape than TAESD's.

    Warn if TAESD is for another generation of models, by its file name.
    """
    factor = model.downscale_factor
    if (model.channels, factor, model.autoencoder.in_channels) != (4, 8, 3):
        raise WeightsMismatch(
            f"`{weights.path}` is TAESD, for latents with 4 channels and 1/8 of the image's size: "
            f"those of {quote_name(model)} have {model.channels} channels and 1/{factor}"
        )
    if _find_taesd_name(weights.path) and is_for_sdxl(weights.path) != is_sdxl(model):
        needed = "taesdxl" if is_sdxl(model) else "taesd"
        warnings.warn(
            f"`{weights.path}` is for {'SD 1 and 2' if is_sdxl(model) else 'SDXL'}, by its name, "
            f"{quote_name(model)} needs `{needed}`: colors will be wrong",
            stacklevel=4,
        )


def is_for_sdxl(path: Path) -> bool:
    """Return whether TAESD is for SDXL, by its file or folder name, as shapes are the same."""
    return SDXL_PATTERN.search(_find_taesd_name(path)) is not None


def _find_taesd_name(path: Path) -> str:
    """Return the file or folder name, in lower case, that contains "taesd"; "" if neither does."""
    names = (path.stem.lower(), path.parent.name.lower())
    return next((name for name in names if "taesd" in name), "")


def _to_our_name(name: str, network: str) -> str:
    """Convert a name in a file to that in `TinyAutoencoder`.

    Args:
        network: "encoder" or "decoder", for a name that contains neither.
    """
    match = LAYER_NAME.fullmatch(name)
    assert match is not None
    network = match["network"] or network
    # diffusers does not count the decoder's first layer, which clamps latents.
    offset = 1 if match["diffusers"] and network == "decoder" else 0
    return f"{network}.{int(match['layer']) + offset}{match['rest']}"
