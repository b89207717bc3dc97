"""Load the Karlo prior from its file, `prior-ckpt-step=01000000-of-01000000.ckpt`."""

from pathlib import Path

import torch

from ldm.loading.build import fill_weights, meta_device
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.matching import match_weights
from ldm.nets.karlo import Prior
from ldm.runtime.errors import FileFormatError

__all__ = ["load_prior"]

TEXT_PROJECTION = "text_enc_proj.weight"


def load_prior(
    path: str | Path,
    *,
    heads: int = 32,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Prior:
    """Load the Karlo prior; its config, except for `heads`, is inferred from the weights."""
    file = read_checkpoint(path)
    state = {name.removeprefix("model."): value for name, value in file.state_dict.items()}
    if TEXT_PROJECTION not in state or "positional_embedding" not in state:
        raise FileFormatError(f"`{path}` is not the file of a Karlo prior")
    width, clip_dim = state[TEXT_PROJECTION].shape
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    num_positions = state["positional_embedding"].shape[1]  # text tokens, and 4 others
    with meta_device():
        prior = Prior(
            clip_dim=clip_dim,
            text_ctx=num_positions - 4,
            xf_width=width,
            xf_layers=len(layers),
            xf_heads=heads,
            xf_final_ln="final_ln.weight" in state,
        )
    state = match_weights(prior, state, path, f"`{path}` does not fit a prior")
    fill_weights(prior, state, device=device, dtype=dtype, memory_mapped=file.memory_mapped)
    return prior.eval()
