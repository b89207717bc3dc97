"""Which processes a run has, on which GPUs: `--gpus 0,1,` of the original, or --nproc.

More than one process are started by torchrun, which takes the place of this one.
"""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ldm.runtime.device import pick_device
from ldm.runtime.ranks import rank_and_world_size

__all__ = ["agreed", "gpus", "launch", "processes"]

log = logging.getLogger(__name__)

T = TypeVar("T")

NODES = """\
{nodes} nodes are started by torchrun on each of them
hint: torchrun --nnodes {nodes} --nproc-per-node {count} --rdzv-backend c10d --rdzv-endpoint \
HOST:29500 scripts/train.py …"""


def gpus(raw: Mapping[str, Any]) -> list[int] | int | None:
    """The GPUs that `lightning.trainer` names: their numbers, how many, -1 for all, None: silent.

    `gpus: 0,1,` and `devices: 0,1,` name two; `gpus: 2` asks for any two, `gpus: 0` for none.
    Raises ValueError for anything else.
    """
    trainer = (raw.get("lightning") or {}).get("trainer") or {}
    value = trainer.get("gpus", trainer.get("devices"))
    if str(trainer.get("accelerator")) == "cpu":
        return 0
    if value is None or value == "auto":
        return None
    words = value if isinstance(value, list) else str(value).split(",")
    try:
        numbers = [int(word) for word in words if str(word).strip()]
    except ValueError:
        raise ValueError(
            f"lightning.trainer.gpus: `{value}` is neither a number of GPUs nor a list as `0,1,`"
        ) from None
    is_list = isinstance(value, list) or "," in str(value)
    return numbers if is_list else numbers[0]


def processes(raw: Mapping[str, Any], nproc: int = 0) -> int:
    """How many processes take part, on all nodes."""
    wanted, nodes = gpus(raw), _nodes(raw)
    count = len(wanted) if isinstance(wanted, list) else max(1, wanted or 1)
    return max(rank_and_world_size()[1], (nproc or count) * nodes)


def launch(raw: Mapping[str, Any], nproc: int, argv: Sequence[str]) -> None:
    """Chooses the GPUs of this process; if there shall be more, torchrun takes its place.

        nproc: processes on this machine, 0 if the GPUs decide.
        argv: of the script, for the processes.
    Raises ValueError if there are not as many GPUs, or nodes are to be started.
    """
    if rank_and_world_size()[1] > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    import torch

    there, wanted = torch.cuda.device_count(), gpus(raw)
    numbers = (
        wanted if isinstance(wanted, list) else list(range(there if wanted == -1 else wanted or 0))
    )
    count = nproc or max(1, len(numbers))
    if _nodes(raw) > 1:
        raise ValueError(NODES.format(nodes=_nodes(raw), count=count))
    if there:
        _show(numbers, there, wanted)
    elif len(numbers) > 1 and not nproc:
        raise ValueError(
            f"{len(numbers)} GPUs are asked for and there is none\nhint: --nproc "
            f"{len(numbers)} starts as many processes on the CPU"
        )
    elif numbers:
        log.info("no GPU here, the CPU is used")
    if count > 1:
        _replace(["--standalone", f"--nproc-per-node={count}", *_script(), *argv])


def agreed(choose: Callable[[Sequence[str]], T]) -> T:
    """What the first process chooses, on all of them.

    choose: is told which torchruns, on which machines, have started the processes; if processes are
        started again after a failure, some of these are the same.
    """
    mine = _starter()
    if rank_and_world_size()[1] == 1:
        return choose([mine] if mine else [])
    from ldm.train.distributed import parallel

    ranks = parallel.start(pick_device(None))
    starters = sorted({*ranks.gathered(mine)} - {""})
    chosen = ranks.told(lambda: choose(starters))
    if ranks.pulse is not None:
        ranks.pulse.stop()  # the run listens by itself
    return chosen


def _starter() -> str:
    """The torchrun that has started this process: its id, machine, number and time; "" if none."""
    launch_id = os.environ.get("TORCHELASTIC_RUN_ID")
    parent = os.getppid()
    try:  # what tells it from one of the same number, in another container or another time
        born = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        born += " " + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):  # not Linux
        born = ""
    return f"{launch_id} {platform.node()} {parent} {born}" if launch_id else ""


def _nodes(raw: Mapping[str, Any]) -> int:
    trainer = (raw.get("lightning") or {}).get("trainer") or {}
    return int(trainer.get("num_nodes") or 1)


def _show(numbers: Sequence[int], there: int, wanted: list[int] | int | None) -> None:
    """Lets this process and its children see the wanted GPUs only."""
    if wanted is None:
        return
    if any(number >= there for number in numbers):
        raise ValueError(f"GPU {max(numbers)} is asked for, here are {there}, from 0 on")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else [str(number) for number in range(there)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in numbers)


def _script() -> list[str]:
    """How this program was started, for torchrun; what follows is not torchrun's."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", "--", spec.name] if spec is not None else ["--", sys.argv[0]]


def _replace(words: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    if os.name == "posix":
        os.execv(sys.executable, command)
    sys.exit(subprocess.run(command, check=False).returncode)
