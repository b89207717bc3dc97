"""Load the Inception network of FID from the file of pytorch-fid or torch-fidelity."""

from pathlib import Path

import torch

from ldm.loading.build import fill_weights, meta_device
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.matching import check_weights
from ldm.loading.published import resolve_checkpoint
from ldm.nets.inception import Inception
from ldm.runtime.errors import FileFormatError

__all__ = ["load_inception"]

NUM_CLASSES = 1008  # of the last layer, which FID does not use
REMEDY = "FID needs TensorFlow's weights of 2015-12-05: `ldm download fid-inception`"


def load_inception(path: str | Path, *, device: str | torch.device = "cpu") -> Inception:
    """Load the Inception network in float32.

    Raises:
        FileFormatError: The file contains another network, such as torchvision's Inception.
    """
    file = read_checkpoint(resolve_checkpoint(path))
    fc_weight = file.state_dict.get("fc.weight")
    if "Mixed_7c.branch_pool.conv.weight" not in file.state_dict or fc_weight is None:
        raise FileFormatError(f"`{path}` is not an Inception network: {REMEDY}")
    if len(fc_weight) != NUM_CLASSES:
        raise FileFormatError(f"`{path}` is an Inception of {len(fc_weight)} classes: {REMEDY}")
    with meta_device():
        net = Inception()
    expected = net.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    state = {name: value for name, value in file.state_dict.items() if not name.startswith("fc.")}
    state |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
    check_weights(expected, state, f"`{path}` does not fit Inception")
    fill_weights(net, state, device=device, memory_mapped=file.memory_mapped)
    return net.eval()
