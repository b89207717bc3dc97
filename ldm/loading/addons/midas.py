"""Add the depth network (MiDaS) to a depth model whose checkpoint does not contain it.

The published depth checkpoint contains it (`depth_model.*`). For others it is read from a given
file, or from `dpt_hybrid-midas-501f0c75.pt` at its original path or in the checkpoint's folder.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.files.clip_statistics import find_near_checkpoint
from ldm.loading.matching import check_weights
from ldm.runtime.errors import FileFormatError, MissingFile
from ldm.runtime.files import find_file

__all__ = ["MIDAS_FILE", "add_depth_network", "read_midas"]

MIDAS_FILE = "midas_models/dpt_hybrid-midas-501f0c75.pt"
DEPTH_PREFIX = "conditioner.depth."
# Of weights that only dpt_hybrid has, not MiDaS's other networks.
DPT_HYBRID_PREFIX = f"{DEPTH_PREFIX}model.pretrained.model.patch_embed.backbone."
NETWORK_PREFIXES = ("pretrained.", "scratch.")


def add_depth_network(
    model_state: Mapping[str, Tensor],
    state: dict[str, Tensor],
    ckpt: Path,
    midas: str | Path | None = None,
) -> bool:
    """Add the weights of the depth network to `state`, in place, if a model needs them.

    Args:
        model_state: State dict of the model, for names and shapes.
        state: Weights of the checkpoint.
        ckpt: Path of the checkpoint.
        midas: File of a depth network that replaces the checkpoint's; None = that of the
            checkpoint, else the file MIDAS_FILE.
    Returns:
        Whether weights were added.
    """
    expected = {name: v for name, v in model_state.items() if name.startswith(DEPTH_PREFIX)}
    if not expected or (midas is None and expected.keys() & state.keys()):
        return False
    path = find_near_checkpoint(ckpt, MIDAS_FILE) if midas is None else find_file(midas)
    if path is None:
        raise MissingFile(
            f"`{ckpt}` contains no depth network (`depth_model.*`)\n"
            f"hint: put `{Path(MIDAS_FILE).name}` beside it, or pass the file",
            "midas",
        )
    depth_state = {name: value for name, value in read_midas(path).items() if name in expected}
    check_weights(expected, depth_state, f"`{path}` does not fit the depth network")
    state |= depth_state
    return True


def read_midas(path: str | Path) -> dict[str, Tensor]:
    """Read the depth network from a file of MiDaS or of a depth model, under our names."""
    depth_state = {}
    for name, value in read_checkpoint(path).state_dict.items():
        name = name.removeprefix("depth_model.").removeprefix("model.")
        if name.startswith(NETWORK_PREFIXES):
            depth_state[f"{DEPTH_PREFIX}model.{name}"] = value
    if not depth_state:
        raise FileFormatError(f"`{path}` is not a file of MiDaS")
    if not any(name.startswith(DPT_HYBRID_PREFIX) for name in depth_state):
        raise FileFormatError(
            f"`{path}` is another network of MiDaS; depth models need dpt_hybrid "
            f"(`{Path(MIDAS_FILE).name}`)"
        )
    return depth_state
