"""Several processes as one: who is who, what they agree on, whose weights lie where.

    ddp     every process holds all weights; gradients are averaged
    fsdp    weights, gradients, optimizer and average are split over all processes
    hsdp    the same within groups of `shard` processes; gradients are averaged between groups

Started by torchrun or Slurm, on one machine or many; alone, everything here does nothing.
Rajbhandari et al. 2020 (arXiv:1910.02054); Zhao et al. 2023 (arXiv:2304.11277).
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
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
from ldm.runtime.ranks import rank_and_world_size

__all__ = ["Ranks", "Replica", "split", "start", "whole"]


T = TypeVar("T")

BLOCKS = (ResBlock, TransformerBlock)  # gathered one at a time
MEETING = timedelta(minutes=10)  # all processes must have started by then
PATIENCE = timedelta(hours=2)  # for others at work; if one of them is lost, its pulse tells


class Ranks:
    """This process among those of the run.

    rank, world: its number and how many there are; (0, 1) alone.
    pulse: watches whether the others live.
    """

    def __init__(self, rank: int = 0, world: int = 1, pulse: "Pulse | None" = None) -> None:
        self.rank, self.world, self.pulse = rank, world, pulse

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def greatest(self, values: Sequence[float]) -> list[float]:
        """Of each of the values, the greatest that any process has."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of each of the values, the mean over all processes; all have the same keys."""
        sums = self._reduced(list(values.values()), dist.ReduceOp.SUM)
        return {key: total / self.world for key, total in zip(values, sums, strict=True)}

    def once(self, work: Callable[[], None]) -> None:
        """The first process does `work`, the others wait; if it fails with OSError, all do."""
        failure = None
        if self.is_first:
            try:
                work()
            except OSError as error:
                failure = error
        if any(self.greatest([failure is not None])):
            raise failure or OSError("the first process failed, its message says why")

    def told(self, choose: Callable[[], T]) -> T:
        """What the first process chooses; its ValueError or OSError is raised on all."""
        said: list[T | ValueError | OSError | None] = [None]
        if self.is_first:
            try:
                said = [choose()]
            except (ValueError, OSError) as error:
                said = [error]
        if self.world > 1:
            dist.broadcast_object_list(said, src=0)
        if isinstance(said[0], ValueError | OSError):
            raise said[0]
        return said[0]  # type: ignore[return-value]

    def gathered(self, text: str) -> list[str]:
        """What each process says, on all."""
        said = [text] * self.world
        if self.world > 1:
            dist.all_gather_object(said, text)
        return said

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process goes through the block alone; then the others, who find its files."""
        if not self.is_first:
            self.greatest([0.0])
        yield
        if self.is_first:
            self.greatest([0.0])

    def stop(self) -> None:
        """The end: after this no process waits for another."""
        if self.pulse is not None:
            dist.barrier()  # until here, who works for long gives signs of life
            self.pulse.stop()
            dist.barrier()  # the first, whom all listen to, leaves last
            dist.destroy_process_group()
            self.pulse, self.rank, self.world = None, 0, 1

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if self.world == 1:
            return [float(value) for value in values]
        joined = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(joined, how)
        found: list[float] = joined.tolist()
        return found


def start(device: torch.device, *, silence: float = 45.0) -> Ranks:
    """This process's place, from the environment of torchrun or Slurm, connected to the others.

    silence: seconds without a sign of life after which a process counts as lost and all others end.
    """
    rank, world = rank_and_world_size()
    if world == 1:
        return Ranks()
    first = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")  # torchrun names its own
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": first, "MASTER_PORT": 29500}
    for name, value in place.items():
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(_turn(store, rank, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    ranks = Ranks(rank, world)
    ranks.pulse = Pulse(rank, world, silence, turn=ranks.told(lambda: uuid4().hex))
    ranks.pulse.start()
    return ranks


def _turn(store: Any, rank: int, world: int) -> str:
    """A name for this start of the processes, the same on all, and of no start before.

    Started again after a failure they find the same store, with all that those before them left
    there, addresses too. So each introduces itself by a new name, and is answered under that.
    Raises TimeoutError or torch's DistStoreError if they do not all come.
    """
    if rank:
        name = uuid4().hex
        store.set(f"newcomer/{rank}", name)
        store.wait([f"turn/{name}"], MEETING)
        turn: str = store.get(f"turn/{name}").decode()
        store.set(f"{turn}/{rank}", "here")
        return turn
    turn, answered, began = uuid4().hex, {""}, time.monotonic()
    others = range(1, world)
    while not store.check([f"{turn}/{other}" for other in others]):
        for key in (f"newcomer/{other}" for other in others):
            newcomer = store.get(key).decode() if store.check([key]) else ""
            if newcomer not in answered:
                store.set(f"turn/{newcomer}", turn)
                answered.add(newcomer)
        if time.monotonic() - began > MEETING.total_seconds():
            here = sum(store.check([f"{turn}/{other}"]) for other in others)
            raise TimeoutError(f"{here} of {len(others)} other processes have come in {MEETING}")
        time.sleep(0.05)
    return turn


class Pulse(threading.Thread):
    """A thread that gives signs of life, and ends this process when another gives none.

    Collectives alone would wait for a stopped process or a dead machine until their time is up.
    The first process listens to all, the others to the first, all through the store of torchrun.

    turn: tells this start of the processes from others.
    """

    def __init__(self, rank: int, world: int, silence: float, *, turn: str) -> None:
        super().__init__(name="pulse", daemon=True)
        self.rank, self.silence = rank, silence
        self.watched = range(1, world) if rank == 0 else range(1)
        self.ended = threading.Event()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=silence))
        self.store = dist.PrefixStore(f"pulse/{turn}", store)

    def run(self) -> None:
        heard = dict.fromkeys(self.watched, (0, time.monotonic()))
        while not self.ended.wait(self.silence / 10):
            try:
                self.store.add(str(self.rank), 1)
                beats = {other: self.store.add(str(other), 0) for other in self.watched}
            except Exception:
                self._end("the connection to the first process is lost")
                return
            now = time.monotonic()
            for other, beat in beats.items():
                if beat != heard[other][0]:
                    heard[other] = (beat, now)
                elif now - heard[other][1] > self.silence:
                    self._end(f"process {other} has been silent for {self.silence:g} s")

    def stop(self) -> None:
        self.ended.set()
        self.join()

    def _end(self, why: str) -> None:
        if not self.ended.is_set():
            sys.stderr.write(f"process {self.rank} ends: {why}\n")
            sys.stderr.flush()
            os._exit(1)  # the main thread may hang in a collective, which nothing interrupts


class Replica(nn.Module):
    """A loss as the `forward` of the module that it trains, which is where DDP listens."""

    def __init__(self, trained: nn.Module, loss: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.trained, self.loss = trained, loss

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return self.loss(batch, generator)


def split(trained: nn.Module, world: int, strategy: str, shard: int | None, device: str) -> None:
    """Splits the weights over the processes in place; each block is gathered when it is used.

    shard: processes that share one copy, for "hsdp".
    """
    groups = (world,)
    if strategy == "hsdp":
        if not shard or world % shard:
            raise ValueError(f"`shard` is {shard}, it must divide the {world} processes")
        groups = (world // shard, shard)  # type: ignore[assignment]
    names = ("replicas", "shards")[-len(groups) :]
    mesh = init_device_mesh(device, groups, mesh_dim_names=names)
    for part in trained.children() if isinstance(trained, nn.ModuleDict) else [trained]:
        if any(p.requires_grad for p in part.parameters()):
            for block in [m for m in part.modules() if isinstance(m, BLOCKS)]:
                fully_shard(block, mesh=mesh)
            # CLIP's `logit_scale`: what has no dimensions cannot be split, and no loss uses it
            scalars = {p for p in part.parameters() if p.ndim == 0}
            fully_shard(part, mesh=mesh, ignored_params=scalars)


def sync_gradients(module: nn.Module, on: bool) -> None:
    """Whether the next backward pass exchanges gradients of split weights."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(on, recurse=False)


def reshard(module: nn.Module) -> None:
    """Gives back what a forward pass without a backward one has left gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_split(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole(state: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Split tensors gathered to the CPU, on every process that says `keep`; all must call it."""
    gathered = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            gathered[name] = full.detach().cpu() if isinstance(value, DTensor) else full
    return gathered
