"""Serve all tasks as a web page, with live previews.

    ldm app                                              # then open http://127.0.0.1:7860
    ldm app --models /data/models --listen --auth me:secret

Images are saved in OUTDIR/samples with their metadata, so that `ldm replay` can reproduce them.
"""

from argparse import Namespace
from collections.abc import Sequence

from ldm.generate.command_line import add_options
from ldm.generate.groups import ModelOptions
from ldm.generate.option_parsers import parse_count, parse_positive
from ldm.generate.options import get_options
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import ArgumentError

__all__ = ["main"]

LIMIT_FLAGS = (  # flag, default, description
    ("--max-side", 2048, "maximum height and width in pixels"),
    ("--max-steps", 150, "maximum number of sampling steps"),
    ("--max-batch", 4, "maximum batch size"),
    ("--max-queue", 16, "maximum number of waiting jobs"),
)
MODEL_OPTIONS = ("lora", "embedding", "device", "precision", "attention", "offload")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(prog=prog, description=__doc__, usage="%(prog)s [flags]")
    add = parser.add_argument
    # fmt: off
    add("--models", default="checkpoints", metavar="DIR",
        help="folder of checkpoints (default: %(default)s)")
    add("--outdir", default="outputs/app", metavar="DIR",
        help="folder for images (default: %(default)s)")
    add("--port", type=parse_count, default=7860, help="port of the page (default: %(default)s)")
    add("--listen", action="store_true",
        help="accept connections from other machines; needs --auth")
    add("--auth", metavar="USER:PASSWORD",
        help="user name and password of the page (default: none)")
    add("--memory", type=parse_positive, metavar="GIB",
        help="device memory for loaded models, in GiB (default: half of it)")
    for flag, limit, description in LIMIT_FLAGS:
        add(flag, type=parse_count, default=limit, metavar="N",
            help=f"{description} (default: %(default)s)")
    add("--preview", action="append", default=[], metavar="FILE",
        help="TAESD decoder for previews, such as taesd_decoder.pth, for SDXL taesdxl_decoder.pth;"
        " may be given several times (default: those in MODELS/vae_approx, else a linear"
        " approximation)")
    # fmt: on
    options = get_options(ModelOptions)
    add_options(parser.add_group("models"), {name: options[name] for name in MODEL_OPTIONS})
    return parser.run(_serve, argv)


def _serve(args: Namespace) -> None:
    has_login = all((args.auth or "").partition(":")[::2])  # neither user nor password is empty
    if args.listen and not has_login:
        raise ArgumentError("--listen needs a login: --auth USER:PASSWORD")
    if args.auth is not None and not has_login:
        # Without the value, which may be the password.
        raise ArgumentError("the login must be USER:PASSWORD", "auth")

    from ldm.app.backend import Backend
    from ldm.app.library import Library
    from ldm.app.limits import Limits

    model_options = ModelOptions(
        device=args.device, precision=args.precision, attention=args.attention, offload=args.offload
    )
    limits = Limits(max_side=args.max_side, max_steps=args.max_steps, max_batch_size=args.max_batch)
    max_model_bytes = args.memory and args.memory * 2**30
    library = Library(args.models, args.embedding, args.lora, args.preview)
    backend = Backend(library, args.outdir, model_options, limits, max_model_bytes)
    from ldm.app.page import Page  # imports gradio, which takes seconds

    page = Page(backend, args.max_queue, is_multi_user=args.listen)
    page.serve(args.port, listen=args.listen, auth=args.auth)
