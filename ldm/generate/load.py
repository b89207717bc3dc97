"""What every script shares: the frame of a run, device and precision, loading, errors of one line.

    argv -> flags.parse -> Namespace -> load -> LatentDiffusion -> jobs.run -> pictures

Environment variables are read here and in `nets.attention`, those of launchers also in `train`.
"""

import logging
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.generate.flags import DEMOS, parse

if TYPE_CHECKING:
    import torch

    from ldm.model import LatentDiffusion

SMALL = 200e6  # bytes of a checkpoint below which half precision and many threads do not pay
DEMO = "no --ckpt given: using the small model that ships with ldm (emoji); for %s"
FULL = {
    "inpaint": "Stable Diffusion 2: --ckpt 512-inpainting-ema.ckpt",
    "upscale": "the upscaler of Stable Diffusion: --ckpt x4-upscaler-ema.ckpt",
}  # what people may have had in mind, by task
TEXT = "Stable Diffusion 2.1: --ckpt v2-1_768-ema-pruned.safetensors --H 768 --W 768"
MEMORY = "out of memory; these help: --n_samples 1, --tile, a smaller --H and --W"

log = logging.getLogger(__name__)


def run(work: Callable[[Namespace], int | None], parser: ArgumentParser,
        argv: Sequence[str] | None = None) -> int:  # fmt: skip
    """Parse, work, and turn whatever goes wrong into one line; returns the exit status."""
    args = parse(parser, argv)
    # Spinning OpenMP threads cost small models a factor of 50 on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _speak(args.verbose)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            return work(args) or 0
        except KeyboardInterrupt:
            log.error("interrupted; what was finished is kept")
            return 130
        except Exception as error:  # the edge of the program: every error becomes a line
            log.error("%s: error: %s", parser.prog, explain(error), exc_info=args.verbose)
            return 1


def load(
    args: Namespace,
    threads: int | None = None,
    loader: "Callable[..., LatentDiffusion] | None" = None,
) -> "LatentDiffusion":
    """The model the flags ask for, on its device, in its precision; `args.size` becomes complete.

        threads: of the CPU; None for what suits the model.
        loader: what to call in place of `ldm.load`, with its arguments.
    Raises ValueError or FileNotFoundError about a flag, as `ldm.load` does.
    """
    import torch

    from ldm.loading.config import find
    from ldm.loading.load import load as load_model
    from ldm.nets.attention import set_backend
    from ldm.nets.cpu import keep_memory

    if args.ckpt is None and args.config is None:
        log.info(DEMO, FULL.get(args.task, TEXT))
        args.ckpt = str(find(DEMOS[args.task])) if args.task in DEMOS else None
    small = args.ckpt is None or _bytes(args.ckpt) < SMALL
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device, small)
    if device.type == "cpu":
        torch.set_num_threads(threads or _suitable_threads(small))
        keep_memory()
    set_backend(args.attention)
    model = (loader or load_model)(
        args.config,
        args.ckpt,
        device=device,
        dtype=dtype,
        ema=args.ema,
        overrides=args.overrides,
        allow=args.allow_module,
        clip_stats=getattr(args, "clip_stats", None),
        midas=getattr(args, "midas", None),
        loras=args.lora,
        embeddings=args.embedding,
    )
    log.info("running on %s in %s", device, str(dtype).removeprefix("torch."))
    _complete(args, model)
    return model


def pick_device(name: str | None) -> "torch.device":
    """The named device, or the best there is; under torchrun each process has its own GPU.

    Raises ValueError if the device is not there.
    """
    import torch

    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = name or next(kind for kind in there if there[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if not there.get(device.type):
        known = ", ".join(kind for kind in there if there[kind])
        raise ValueError(f"--device {name} is not available here, choose one of {known}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local % torch.cuda.device_count())
    return device


def pick_dtype(precision: str, device: "torch.device", small: bool) -> "torch.dtype":
    """The weights' dtype: as asked for, or half precision where it pays.

    small: such models stay in float32.
    """
    import torch

    named = {"full": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision in named:
        return named[precision]
    if small:
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _has_fast_bf16() else torch.float32
    return torch.float16


def share() -> tuple[int, int]:
    """(rank, number of processes) under torchrun or Slurm; (0, 1) alone."""
    for rank, ranks in (
        ("RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ):
        if rank in os.environ and ranks in os.environ:
            return int(os.environ[rank]), int(os.environ[ranks])
    return 0, 1


def explain(error: BaseException) -> str:
    """One line (or the two of our own messages) about what went wrong."""
    if is_out_of_memory(error):
        return MEMORY
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, (ValueError, KeyError, OSError, ImportError, ArithmeticError)) and text:
        return text
    first = text.strip().splitlines()[0] if text.strip() else "no message"
    return f"{type(error).__name__}: {first} (--verbose shows where)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whichever device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("out of memory", "not enough memory", "alloc_cpu"))
    )


def _speak(verbose: bool) -> None:
    """Send what ldm logs to stderr; results alone go to stdout."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("ldm")
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.WARNING)
    for name in ("ldm.generate.load", "ldm.generate.run"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    log.warning("%s: %s", category.__name__, str(message).splitlines()[0])


def _bytes(path: str) -> int:
    file = Path(path).expanduser()
    files = file.glob("*/*.safetensors") if file.is_dir() else [file]
    return sum(file.stat().st_size for file in files if file.is_file())


def _has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; others are slower with it than without."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    return any(feature in text for feature in (" avx512_bf16", " amx_bf16"))


def _suitable_threads(small: bool) -> int:
    """Few threads for small models, and no more than this process' share of the cores."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", 1)))
    return max(1, min(torch.get_num_threads() // processes, 4 if small else 1024))


def _complete(args: Namespace, model: "LatentDiffusion") -> None:
    """Fill in the size, and say which flags the model contradicts."""
    for flag, own in (("C", model.channels), ("f", model.downscale)):
        if getattr(args, flag) not in (None, own):
            log.warning("--%s %d is ignored: the model has %d", flag, getattr(args, flag), own)
    for flag in ("torchscript", "ipex", "laion400m"):
        if getattr(args, flag):
            log.warning("--%s has no meaning any more and is ignored", flag)
    if "H" not in args:
        return
    if args.sampler == "dpm" and args.ddim_eta:
        log.warning("--dpm is deterministic: --ddim_eta %g is ignored", args.ddim_eta)
        args.ddim_eta = 0.0
    native = model.image_size * model.downscale
    is_text = args.task == "txt2img" and model.parameterization == "v"
    if native == 512 and is_text and args.H is args.W is None:
        log.info("Stable Diffusion 2 v models were trained at 768: --H 768 --W 768 may be better")
    args.size = (args.H or native, args.W or native)
