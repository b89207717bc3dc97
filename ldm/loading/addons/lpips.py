"""Load LPIPS from local files; nothing is downloaded.

They are a training checkpoint of an original autoencoder (`loss.perceptual_loss.*`), or two files:
the linear layers of the package lpips, and VGG16 of torchvision.
"""

import bisect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.weight_names import select_loss_state, select_prefix
from ldm.nets.lpips import LPIPS
from ldm.runtime.errors import FileFormatError
from ldm.runtime.files import find_file

__all__ = ["LPIPS_FILES", "build_lpips", "read_lpips"]

LPIPS_FILES = (  # for messages
    "a training checkpoint of an autoencoder with `loss.perceptual_loss.*` (kl-f8), or the two "
    "files [`vgg.pth` of the package lpips, `vgg16-397923af.pth` of torchvision]"
)
LPIPS_PREFIX = "perceptual_loss."
TORCHVISION_LAYER = re.compile(r"features\.(\d+)\.(weight|bias)")
SLICE_STARTS = (4, 9, 16, 23)  # index of the first layer of VGG's slices 2 to 5


def read_lpips(paths: str | Path | Sequence[str | Path]) -> LPIPS:
    """Return LPIPS with the weights of one file, or of several files together.

    Raises:
        FileFormatError: Weights are missing.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    state: dict[str, Tensor] = {}
    for path in paths:
        content = read_checkpoint(find_file(path)).state_dict
        state |= select_loss_state(content) or {LPIPS_PREFIX + n: v for n, v in content.items()}
    if (net := build_lpips(state)) is None:
        names = ", ".join(f"`{path}`" for path in paths)
        raise FileFormatError(f"{names}: weights of LPIPS are missing, it needs {LPIPS_FILES}")
    return net


def build_lpips(loss_state: Mapping[str, Tensor]) -> LPIPS | None:
    """Return LPIPS from the result of `select_loss_state`; None if weights are missing."""
    state = {_to_our_name(name): v for name, v in select_prefix(loss_state, LPIPS_PREFIX).items()}
    if not state:
        return None
    net = LPIPS()
    expected = net.state_dict()
    constants = {name: value for name, value in expected.items() if "scaling_layer" in name}
    state = constants | {name: value for name, value in state.items() if name in expected}
    if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in expected.items()}:
        return None
    net.load_state_dict(state)
    return net


def _to_our_name(name: str) -> str:
    """Convert torchvision's `features.5.weight` to `net.slice2.5.weight`."""
    if match := TORCHVISION_LAYER.fullmatch(name):
        return f"net.slice{1 + bisect.bisect(SLICE_STARTS, int(match[1]))}.{match[1]}.{match[2]}"
    return name
