"""The depth network of a depth model, from the file in which the MiDaS project published it.

The published depth checkpoint holds it (`depth_model.*`). For others it comes from
`dpt_hybrid-midas-501f0c75.pt`, where the original kept that, or beside the checkpoint, or from the
file that is passed.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.loading.build import check_weights
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.files.clip_statistics import find_beside
from ldm.loading.legacy import rename_weights
from ldm.runtime.errors import FileFormatError, MissingFile
from ldm.runtime.files import find_file

__all__ = ["FILE", "add_depth_network", "read_midas"]

FILE = "midas_models/dpt_hybrid-midas-501f0c75.pt"
OURS = "conditioner.depth."
HYBRID = f"{OURS}model.pretrained.model.patch_embed.backbone."  # other networks have no such part
PARTS = ("pretrained.", "scratch.")


def add_depth_network(
    wanted: Mapping[str, Tensor],
    state: dict[str, Tensor],
    ckpt: Path,
    midas: str | Path | None = None,
) -> bool:
    """Add the weights of the depth network to those of a depth model that has none.

    Args:
        wanted: what the model needs, under our names.
        state: weights of the checkpoint, under our names; is changed.
        midas: a file of MiDaS, which comes before the depth network of the checkpoint.

    Returns:
        Whether weights of another file were added.

    Raises:
        MissingFile: there is no such file, neither passed nor found.
        ValueError: the file holds something else.
    """
    names = [name for name in wanted if name.startswith(OURS)]
    if not names or (midas is None and any(name in state for name in names)):
        return False
    path = find_beside(ckpt, FILE) if midas is None else find_file(midas)
    if path is None:
        raise MissingFile(
            f"`{ckpt}` holds no depth network (`depth_model.*`)\n"
            f"hint: put `{Path(FILE).name}` beside it, or pass the file",
            "midas",
        )
    network = read_midas(path)
    own = {name: value for name, value in network.items() if name in wanted}
    misfit = f"`{path}` does not fit the depth network"
    check_weights({name: wanted[name] for name in names}, own, misfit)
    state |= own
    return True


def read_midas(path: str | Path) -> dict[str, Tensor]:
    """The network in a file of MiDaS, or in the checkpoint of a depth model, under our names.

    Raises:
        MissingFile: the file is missing.
        FileFormatError: it holds something else.
    """
    state = read_checkpoint(path).state
    bare = {name.removeprefix("depth_model.").removeprefix("model."): name for name in state}
    originals = {f"depth_model.model.{n}": state[o] for n, o in bare.items() if n.startswith(PARTS)}
    network = rename_weights(originals)
    if not network:
        raise FileFormatError(f"`{path}` is not a file of MiDaS")
    if not any(name.startswith(HYBRID) for name in network):
        raise FileFormatError(
            f"`{path}` is another network of MiDaS, depth models need dpt_hybrid "
            f"(`{Path(FILE).name}`)"
        )
    return network
