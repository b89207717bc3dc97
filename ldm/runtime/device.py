"""Choose device, dtype and number of threads for this machine; get its memory and CPU features."""

import ctypes
import functools
import os
import platform
from pathlib import Path

import torch

from ldm.runtime.errors import ArgumentError
from ldm.runtime.ranks import get_local_rank, get_local_world_size

__all__ = [
    "get_free_memory", "get_total_memory", "has_amx", "has_fast_bf16", "is_intel",
    "keep_freed_memory", "pick_device", "pick_dtype", "pick_wide_range_dtype", "set_threads",
]  # fmt: skip

PRECISIONS = {"full": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_MEMORY_BYTES = 16 << 30  # if the system does not report its memory
SMALL_MODEL_THREADS = 4  # more threads are slower for small models


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or the best available one; with torchrun, each process's own GPU.

    Args:
        name: Such as "cuda", "cuda:1", "mps" or "cpu"; None = the first of cuda, mps and cpu that
            is available.
    """
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    available = [device_type for device_type, count in counts.items() if count]
    name = name or available[0]
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:  # not the name of a device
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        message = f"device `{name}` is not available here, choose one of {', '.join(available)}"
        raise ArgumentError(message, "device")
    if device.type == "cuda" and device.index is None:
        # Modulo, as a launcher may show each of its processes only one GPU, with index 0.
        device = torch.device("cuda", get_local_rank() % torch.cuda.device_count())
    return device


def pick_dtype(precision: str, device: torch.device, is_small: bool) -> torch.dtype:
    """Return the dtype for weights.

    Args:
        precision: "full", "fp16", "bf16", or "autocast": half precision where it is faster.
        is_small: Whether the model is small, so that "autocast" is float32.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    if is_small:
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return torch.float16


def pick_wide_range_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for networks that overflow in float16: bfloat16 on GPUs that have it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def set_threads(threads: int | None, is_small: bool) -> None:
    """Set the number of CPU threads of this process.

    Args:
        threads: None = the cores divided by the processes on this machine, at most 4 for small
            models; unchanged if OMP_NUM_THREADS is set.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        limit = SMALL_MODEL_THREADS if is_small else torch.get_num_threads()
        threads = max(1, min(torch.get_num_threads() // get_local_world_size(), limit))
    if threads is not None:
        torch.set_num_threads(threads)


def get_total_memory(device: torch.device) -> int:
    """Return the total memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Linux
        return DEFAULT_MEMORY_BYTES


def get_free_memory() -> float:
    """Return the bytes of memory that are available to this process, within its container.

    Infinity if the system does not report them.
    """
    limits = [float("inf")]
    try:
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) << 10)  # reported in KiB
        limit, used = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text("utf-8")
            for name in ("max", "current")
        )
        limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # not on Linux, or a limit of "max"
    return min(limits)


def keep_freed_memory() -> bool:
    """Make glibc keep freed buffers of this process for reuse; return whether it does.

    By default, each large activation is mapped, faulted in page by page, and unmapped again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    # Older versions refuse more than 32 MiB.
    is_mmap_set = any(mallopt(mmap_threshold, size) for size in (1 << 30, 32 << 20))
    return is_mmap_set and bool(mallopt(trim_threshold, (1 << 31) - 1))


def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively; on others, float32 is faster."""
    return any(feature in _read_cpu_info() for feature in (" avx512_bf16", " amx_bf16"))


def has_amx() -> bool:
    """Return whether this CPU has AMX, a unit that multiplies bfloat16 matrices."""
    return " amx_bf16" in _read_cpu_info()


def is_intel() -> bool:
    """Return whether this CPU is made by Intel."""
    return "GenuineIntel" in _read_cpu_info()


@functools.cache
def _read_cpu_info() -> str:
    """Return the content of /proc/cpuinfo, else the processor's name according to `platform`."""
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8") if file.is_file() else platform.processor()
