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
from ldm.runtime.errors import explain, is_out_of_memory

if TYPE_CHECKING:
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
            text = MEMORY if is_out_of_memory(error) else explain(error)
            log.error("%s: error: %s", parser.prog, text, exc_info=args.verbose)
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
    from ldm.loading.load import load as load_model
    from ldm.nets.attention import set_backend
    from ldm.nets.cpu import keep_memory
    from ldm.runtime.device import pick_device, pick_dtype, set_threads
    from ldm.runtime.files import find_file

    if args.ckpt is None and args.config is None:
        log.info(DEMO, FULL.get(args.task, TEXT))
        args.ckpt = str(find_file(DEMOS[args.task])) if args.task in DEMOS else None
    small = args.ckpt is None or _bytes(args.ckpt) < SMALL
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device, small)
    if device.type == "cpu":
        set_threads(threads, small)
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
