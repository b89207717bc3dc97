"""Read and write `.latent` files in ComfyUI's format: one latent, in the autoencoder's scale.

Our files also contain the generation parameters of the image, and the latent space.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm.loading.files.checkpoint import read_checkpoint
from ldm.model import LatentDiffusion, LatentSpace
from ldm.pipelines.families import quote_name
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile
from ldm.runtime.files import write_atomically
from ldm.runtime.types import JsonMapping

__all__ = ["LATENT_SUFFIX", "StoredLatent", "list_latents", "load_latent", "save_latent"]

LATENT_SUFFIX = ".latent"
LATENT_KEY, VERSION_KEY = "latent_tensor", "latent_format_version_0"  # names of tensors
PARAMETERS_KEY, SPACE_KEY = "ldm", "ldm.latent_space"  # of the metadata
# Latents in ComfyUI's files without a version are in the scale of SD 1 and 2's UNet.
UNVERSIONED_SCALE_FACTOR = 0.18215


@dataclass(frozen=True, eq=False)
class StoredLatent:
    """A latent read from a file.

    Args:
        latent: (1, C, h, w) float32, in the autoencoder's scale.
        space: Latent space of its model; None = unknown.
    """

    path: str | Path
    latent: Tensor
    space: LatentSpace | None

    def normalize(self, model: LatentDiffusion) -> Tensor:
        """Return the latent (1, C, h, w) in the scale of a model's UNet.

        Raises:
            ArgumentError: The latent space is that of another model.
        """
        expected = model.latent_space
        channels = self.latent.shape[1]
        if channels != expected.channels or (self.space and not expected.matches(self.space)):
            raise ArgumentError(
                f"`{self.path}` is a latent of another kind than {quote_name(model)} reads: use "
                "its image",
                "init_img",
            )
        return model.normalize(self.latent)


def save_latent(
    path: str | Path, z: Tensor, model: LatentDiffusion, parameters: JsonMapping
) -> None:
    """Write a latent (C, h, w) in the scale of a model's UNet, with its generation parameters."""
    latent = model.denormalize(z[None].detach().float())
    tensors = {LATENT_KEY: latent.cpu().contiguous(), VERSION_KEY: torch.empty(0)}
    space = json.dumps(asdict(model.latent_space))
    metadata = {PARAMETERS_KEY: json.dumps(parameters, default=str), SPACE_KEY: space}
    with write_atomically(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def load_latent(path: str | Path) -> StoredLatent:
    """Read a latent from a file."""
    checkpoint = read_checkpoint(path)
    latent = checkpoint.state_dict.get(LATENT_KEY)
    if latent is None:
        raise FileFormatError(f"`{path}` is not a latent: it has no `{LATENT_KEY}`")
    if latent.dim() != 4 or latent.shape[0] != 1 or not latent.numel():
        raise FileFormatError(f"`{path}` is not one latent: its shape is {tuple(latent.shape)}")
    if not latent.isfinite().all():
        raise FileFormatError(f"`{path}` has values that are NaN or infinite")
    latent = latent.float().clone()
    if VERSION_KEY not in checkpoint.state_dict:
        latent = latent / UNVERSIONED_SCALE_FACTOR
    try:
        fields: Any = json.loads(checkpoint.metadata[SPACE_KEY])
        space = LatentSpace(**fields)
    except KeyError:
        space = None
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"`{path}`: `{SPACE_KEY}` in it is damaged") from error
    return StoredLatent(path, latent, space)


def list_latents(folder: str | Path) -> list[Path]:
    """Return the latent files in a folder, sorted by name."""
    paths = sorted(Path(folder).glob(f"[!.]*{LATENT_SUFFIX}"))
    if not paths:
        raise MissingFile(f"no latents (`*{LATENT_SUFFIX}`) in `{folder}`", "init_img")
    return paths
