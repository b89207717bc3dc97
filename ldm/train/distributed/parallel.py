"""Several processes of one run: ranks, collectives, sharded weights, heartbeats.

    ddp     every process holds all weights; gradients are averaged
    fsdp    weights, gradients, optimizer and EMA are sharded over all processes
    hsdp    the same within groups of `shard_size` processes; gradients are averaged between groups

Processes are started by torchrun or Slurm, on one machine or many. In a single process, everything
here is a no-op.
Rajbhandari et al. 2020 (arXiv:1910.02054); Zhao et al. 2023 (arXiv:2304.11277).
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from ldm.nets.blocks import ResBlock
from ldm.nets.transformer import TransformerBlock
from ldm.runtime.ranks import get_rank_and_world_size
from ldm.train.tasks.task import Batch, Losses, LossFunction

__all__ = [
    "LossModule", "Ranks", "connect", "eval_mode", "gather_shards", "is_sharded", "reshard",
    "set_gradient_sync", "shard",
]  # fmt: skip

T = TypeVar("T")

SHARDED_BLOCKS = (ResBlock, TransformerBlock)  # sharded one by one, to gather one at a time
START_TIMEOUT = timedelta(minutes=10)  # all processes must have started by then
# Long, as ranks may be busy; the heartbeat detects lost ones.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass
class Ranks:
    """The rank of this process, and collectives over all processes.

    Args:
        heartbeat: Detects lost processes; None in a single process.
    """

    rank: int = 0
    world_size: int = 1
    heartbeat: "Heartbeat | None" = None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Return the maximum of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each value over all processes; all pass the same keys."""
        sums = self.all_reduce_sum(list(values.values()))
        return {key: total / self.world_size for key, total in zip(values, sums, strict=True)}

    def run_on_main_process(self, function: Callable[[], T]) -> T:
        """Call `function` on the main process, and return its result on all.

        Raises:
            ValueError, OSError: On all processes, if `function` does.
        """
        results: list[T | ValueError | OSError | None]
        try:
            results = [function()] if self.is_main_process else [None]
        except (ValueError, OSError) as error:
            results = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(results, src=0)
        if isinstance(results[0], ValueError | OSError):
            raise results[0]
        return results[0]  # type: ignore[return-value]

    def all_gather_texts(self, text: str) -> list[str]:
        """Return the texts of all processes by rank, on all processes."""
        texts = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(texts, text)
        return texts

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the context on the main process first, then on the others, which find its files."""
        if not self.is_main_process:
            self.all_reduce_max([0.0])
        yield
        if self.is_main_process:
            self.all_reduce_max([0.0])

    def disconnect(self) -> None:
        """Disconnect this process from the others, once all have called this."""
        if self.heartbeat is not None:
            dist.barrier()  # busy processes send heartbeats until here
            self.heartbeat.stop()
            dist.barrier()  # the main process, which all others watch, leaves last
            dist.destroy_process_group()
            self.heartbeat = None
            self.rank = 0
            self.world_size = 1

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op)
        return [float(value) for value in tensor]


def connect(device: torch.device, *, timeout: float = 45.0) -> Ranks:
    """Connect the processes that torchrun or Slurm has started, by environment variables.

    Args:
        timeout: Seconds without a heartbeat after which a process counts as lost, and all others
            exit.
    """
    rank, world_size = get_rank_and_world_size()
    if world_size == 1:
        return Ranks()
    host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")  # torchrun sets MASTER_ADDR
    defaults = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": host, "MASTER_PORT": 29500}
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, _, _ = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = dist.PrefixStore(agree_on_session(store, rank, world_size), store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
        )
    ranks = Ranks(rank, world_size)
    session = ranks.run_on_main_process(lambda: uuid4().hex)
    ranks.heartbeat = Heartbeat(rank, world_size, timeout, session=session)
    ranks.heartbeat.start()
    return ranks


def agree_on_session(store: dist.Store, rank: int, world_size: int) -> str:
    """Agree on a unique name for this start of the processes.

    Processes that are restarted after a failure find the same store, with stale values in it. So
    each process requests the session by a new id, and rank 0 replies to that id.

    Raises:
        TimeoutError, DistStoreError: Some processes did not start.
    """
    if rank:
        request = uuid4().hex
        store.set(f"request/{rank}", request)
        store.wait([f"reply/{request}"], START_TIMEOUT)
        session: str = store.get(f"reply/{request}").decode()
        store.set(f"{session}/{rank}", "joined")
        return session
    session = uuid4().hex
    answered_requests = {""}
    start = time.monotonic()
    other_ranks = range(1, world_size)
    while not store.check([f"{session}/{other}" for other in other_ranks]):
        for key in (f"request/{other}" for other in other_ranks):
            request = store.get(key).decode() if store.check([key]) else ""
            if request not in answered_requests:
                store.set(f"reply/{request}", session)
                answered_requests.add(request)
        if time.monotonic() - start > START_TIMEOUT.total_seconds():
            num_joined = sum(store.check([f"{session}/{other}"]) for other in other_ranks)
            raise TimeoutError(
                f"only {num_joined} of {world_size - 1} other processes started in {START_TIMEOUT}"
            )
        time.sleep(0.05)
    return session


class Heartbeat(threading.Thread):
    """Sends heartbeats, and exits this process when another rank's heartbeats stop.

    Collectives would wait for a stopped process or a dead machine until their timeout. Rank 0
    watches all others, which watch rank 0, all through torchrun's store.

    Args:
        timeout: Seconds without a heartbeat after which a rank counts as lost.
        session: Unique name of this start of the processes.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, *, session: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank = rank
        self.timeout = timeout
        self.watched_ranks = range(1, world_size) if rank == 0 else range(1)
        self.stop_event = threading.Event()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
        self.store = dist.PrefixStore(f"heartbeat/{session}", store)

    def run(self) -> None:
        # Number and time of the last heartbeat of each rank.
        last_counts = dict.fromkeys(self.watched_ranks, 0)
        last_times = dict.fromkeys(self.watched_ranks, time.monotonic())
        while not self.stop_event.wait(self.timeout / 10):
            try:
                self.store.add(str(self.rank), 1)
                counts = {other: self.store.add(str(other), 0) for other in self.watched_ranks}
            except Exception:  # torch's store raises various errors when its server is gone
                self._exit("the connection to the main process is lost")
                return
            now = time.monotonic()
            for other, count in counts.items():
                if count != last_counts[other]:
                    last_counts[other], last_times[other] = count, now
                elif now - last_times[other] > self.timeout:
                    self._exit(f"process {other} has been silent for {self.timeout:g} s")

    def stop(self) -> None:
        self.stop_event.set()
        self.join()

    def _exit(self, reason: str) -> None:
        if not self.stop_event.is_set():
            sys.stderr.write(f"process {self.rank} ends: {reason}\n")
            sys.stderr.flush()
            os._exit(1)  # the main thread may hang in an uninterruptible collective


class LossModule(nn.Module):
    """Computes a loss in `forward`, where DistributedDataParallel hooks into the module."""

    def __init__(self, module: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Batch, generator: torch.Generator) -> Losses:
        return self.loss(batch, generator)


def shard(
    module: nn.Module, world_size: int, strategy: str, shard_size: int | None, device: str
) -> None:
    """Shard the weights over the processes in place; each block is gathered when it is used.

    Args:
        strategy: "fsdp" or "hsdp".
        shard_size: Number of processes that share one copy, for "hsdp".
        device: Device type, such as "cuda".
    """
    shape: tuple[int, ...] = (world_size,)
    if strategy == "hsdp":
        assert shard_size is not None  # see `Settings.check_strategy`
        shape = (world_size // shard_size, shard_size)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for network in module.children() if isinstance(module, nn.ModuleDict) else [module]:
        if any(p.requires_grad for p in network.parameters()):
            for block in [m for m in network.modules() if isinstance(m, SHARDED_BLOCKS)]:
                fully_shard(block, mesh=mesh)
            # Scalars cannot be sharded: CLIP's `logit_scale`, on which no loss depends.
            scalars = {p for p in network.parameters() if p.ndim == 0}
            fully_shard(network, mesh=mesh, ignored_params=scalars)


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Set whether backward passes exchange the gradients of sharded weights."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.set_requires_gradient_sync(enabled, recurse=False)


def reshard(module: nn.Module) -> None:
    """Free weights that a forward pass without backward pass has left gathered."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Within the context, keep a module in eval mode, without gradients; reshard it afterwards.

    With `inference_mode`, the weights that a sharded model gathers would be inference tensors,
    which autograd cannot use in the next training step.
    """
    training_modules = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(module)
        for submodule in training_modules:
            submodule.training = True


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(submodule, FSDPModule) for submodule in module.modules())


def gather_shards(state: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Gather sharded tensors to the CPU, on processes with `keep`; all processes must call it."""
    tensors = {}
    for name, value in state.items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            tensors[name] = tensor.detach().cpu() if isinstance(value, DTensor) else tensor
    return tensors
