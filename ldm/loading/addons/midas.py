"""The depth network of a depth model, from the file that the MiDaS project published it in.

The published depth checkpoint holds it (`depth_model.*`). One without it takes it from
`dpt_hybrid-midas-501f0c75.pt`, which is found where the original kept it, or beside the checkpoint,
or where the user says.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.files.clip_statistics import find_beside
from ldm.loading.legacy import rename_weights
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
    given: str | Path | None = None,
) -> bool:
    """Completes the weights of a depth model with a depth network, where they have none.

        wanted, state: what the model has, and what the checkpoint gives it, under our names.
        given: a file of MiDaS, which comes before what the checkpoint holds.
    Returns whether anything was taken from another file.
    Raises FileNotFoundError if none is there, ValueError if the file holds something else.
    """
    names = [name for name in wanted if name.startswith(OURS)]
    if not names or (given is None and any(name in state for name in names)):
        return False
    path = find_beside(ckpt, FILE) if given is None else find_file(given)
    if path is None:
        raise FileNotFoundError(
            f"`{ckpt}` holds no depth network (`depth_model.*`)\n"
            f"hint: put `{Path(FILE).name}` beside it, or say where that is (--midas)"
        )
    found = read_midas(path)
    missing = [name for name in names if name not in found]
    shapes = [n for n in names if n in found and found[n].shape != wanted[n].shape]
    if missing or shapes:
        first = (missing or shapes)[0].removeprefix(f"{OURS}model.")
        raise ValueError(
            f"`{path}` does not fit the depth network: {len(missing)} tensors are missing, "
            f"{len(shapes)} of another shape, the first is `{first}`"
        )
    state |= {name: found[name] for name in names}
    return True


def read_midas(path: str | Path) -> dict[str, Tensor]:
    """The network in a file of MiDaS, or in the checkpoint of a depth model, under our names.

    Raises FileNotFoundError, or ValueError if the file holds something else.
    """
    state = read_checkpoint(path).state
    bare = {name.removeprefix("depth_model.").removeprefix("model."): name for name in state}
    ours = {f"depth_model.model.{n}": state[o] for n, o in bare.items() if n.startswith(PARTS)}
    found = rename_weights(ours)
    if not found:
        raise ValueError(f"`{path}` is not a file of MiDaS")
    if not any(name.startswith(HYBRID) for name in found):
        raise ValueError(
            f"`{path}` is another network of MiDaS, depth models need dpt_hybrid "
            f"(`{Path(FILE).name}`)"
        )
    return found
