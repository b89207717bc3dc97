"""Start the processes of a run on their GPUs: `--gpus 0,1,` as in the original, or --nproc.

If there are several, this process is replaced by torchrun, which starts them.
"""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ldm.runtime.ranks import get_rank_and_world_size

if TYPE_CHECKING:
    from ldm.train.config.settings import Devices

__all__ = ["count_processes", "launch", "run_on_main_process"]

log = logging.getLogger(__name__)

T = TypeVar("T")

MODULE = "ldm.train.command"  # the module that torchrun starts
MULTI_NODE_ERROR = """\
a run on {nodes} nodes is started by torchrun on each of them
hint: torchrun --nnodes {nodes} --nproc-per-node {count} --rdzv-backend c10d --rdzv-endpoint \
HOST:29500 -m {module} …"""


def count_processes(devices: "Devices", nproc_per_node: int = 0) -> int:
    """Count the processes on all nodes; `nproc_per_node` 0 is one for each GPU."""
    count = nproc_per_node or max(1, len(_list_gpus(devices.gpus)))
    return max(get_rank_and_world_size()[1], count * devices.num_nodes)


def launch(devices: "Devices", nproc_per_node: int, argv: Sequence[str]) -> None:
    """Select the GPUs of this process; replace it by torchrun if several processes are requested.

    Args:
        nproc_per_node: Number of processes on this machine; 0 = one for each GPU.
        argv: Command-line arguments of the processes.
    Raises:
        ValueError: There are too few GPUs, or several nodes are requested.
    """
    if devices.needs_gpu:
        from ldm.runtime.device import pick_device

        if pick_device().type == "cpu":
            raise ValueError(
                "lightning.trainer.accelerator requests a GPU, none is available\n"
                "hint: lightning.trainer.accelerator=auto trains on the CPU"
            )
    if get_rank_and_world_size()[1] > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    import torch

    num_available, indices = torch.cuda.device_count(), _list_gpus(devices.gpus)
    count = nproc_per_node or max(1, len(indices))
    if devices.num_nodes > 1:
        raise ValueError(
            MULTI_NODE_ERROR.format(nodes=devices.num_nodes, count=count, module=MODULE)
        )
    if num_available:
        if devices.gpus is not None:
            _set_visible_devices(indices, num_available)
    elif len(indices) > 1 and not nproc_per_node:
        raise ValueError(
            f"{len(indices)} GPUs requested, none available\nhint: --nproc {len(indices)} starts "
            "as many processes on the CPU"
        )
    elif indices:
        log.info("no GPU available, training on the CPU")
    if count > 1:
        _replace_process(["--standalone", f"--nproc-per-node={count}", "-m", "--", MODULE, *argv])


def run_on_main_process(function: Callable[[Sequence[str]], T]) -> T:
    """Call a function on the main process, and return its result on all.

    Args:
        function: Takes the ids of the torchruns that started the processes. When processes are
            restarted after a failure, some torchruns and their ids remain.
    """
    torchrun_id = _get_torchrun_id()
    if get_rank_and_world_size()[1] == 1:
        return function([torchrun_id] if torchrun_id else [])
    from ldm.runtime.device import pick_device
    from ldm.train.distributed import parallel

    ranks = parallel.connect(pick_device(None))
    torchrun_ids = sorted({*ranks.all_gather_texts(torchrun_id)} - {""})
    result = ranks.run_on_main_process(lambda: function(torchrun_ids))
    if ranks.heartbeat is not None:
        ranks.heartbeat.stop()  # the run has a heartbeat of its own
    return result


def _get_torchrun_id() -> str:
    """Return an id of the torchrun that started this process; "" if none."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    parent = os.getppid()
    # Process ids repeat in other containers and after a reboot: add start time and boot id.
    try:
        # Field 22 is the start time; field 2, a name in parentheses, may contain spaces.
        start_time = Path(f"/proc/{parent}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
        start_time += " " + Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    except (OSError, IndexError):  # not Linux
        start_time = ""
    return f"{run_id} {platform.node()} {parent} {start_time}" if run_id else ""


def _list_gpus(gpus: list[int] | int | None) -> list[int]:
    """Return the indices of GPUs from a list or a count; -1 = all that are available."""
    if isinstance(gpus, list):
        return gpus
    if gpus == -1:
        import torch

        return list(range(torch.cuda.device_count()))
    return list(range(gpus or 0))


def _set_visible_devices(indices: Sequence[int], num_available: int) -> None:
    """Hide all GPUs but these from this process and its children."""
    if any(index >= num_available for index in indices):
        raise ValueError(f"GPU {max(indices)} requested, {num_available} available, counted from 0")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    device_names = visible.split(",") if visible else [str(index) for index in range(num_available)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(device_names[index] for index in indices)


def _replace_process(arguments: Sequence[str]) -> None:
    """Run torchrun in place of this process."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    if os.name == "posix":
        os.execv(sys.executable, command)
    sys.exit(subprocess.run(command, check=False).returncode)
