"""Reproduce an image from the metadata in its PNG, and compare.

    ldm replay outputs/txt2img-samples/samples/00000.png
    ldm replay 00000.png --show-command

Prints `identical` (exit status 0), or how much the pixels differ and what has changed since (exit
status 1). --ckpt and --config set the current paths of the model's files.
"""

import os
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from os.path import expanduser

from ldm.generate.command_line import add_options, to_argv
from ldm.generate.groups import GROUP_HEADINGS, SDXL, ModelOptions, UpscalerOptions
from ldm.generate.options import get_options
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import FileFormatError, errors_as
from ldm.runtime.files import check_parent_folder

__all__ = ["main"]

MODEL_OPTIONS = {
    **get_options(ModelOptions),
    "refiner": get_options(SDXL)["refiner"],
    "upscaler": get_options(UpscalerOptions)["upscaler"],
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    usage = "%(prog)s [flags] [key=value ...] IMAGE"
    parser = CommandParser(prog=prog, description=__doc__, usage=usage, takes_overrides=True)
    # No defaults, as options that are not given keep their recorded values.
    options = {
        name: replace(
            option, default=None, help=option.help.replace("%(default)s", "the recorded one")
        )
        for name, option in MODEL_OPTIONS.items()
    }
    add_options(parser.add_group(GROUP_HEADINGS["model"]), options)
    parser.add_argument("image", type=expanduser, metavar="IMAGE", help="a PNG written by ldm")
    parser.add_argument("--output", metavar="FILE", help="save the new image here")
    parser.add_argument("--show-command", action="store_true",
        help="print the command that made it, and exit")  # fmt: skip
    return parser.run(_replay, argv)


def _replay(args: Namespace) -> int:
    from ldm.generate.info import make_run_info
    from ldm.generate.load import load_models
    from ldm.generate.replay import (
        check_inputs,
        compare_infos,
        compare_results,
        make_replay_request,
        read_request,
        reproduce_image,
    )
    from ldm.imaging.metadata import hash_pixels, read_info, write_png
    from ldm.imaging.reading import open_image

    if args.output:
        check_parent_folder(args.output, "output")
    values = {name: vars(args)[name] for name in MODEL_OPTIONS}
    changes = {name: value for name, value in values.items() if value not in (None, [])}
    info = read_info(args.image)
    summary = f"the generation parameters in {args.image} are damaged"
    with errors_as(FileFormatError, summary):
        request = read_request(info, args.image)
    if args.show_command:
        if "indir" in request.task.options:  # the command for this image of the folder
            request = request.with_values({"indir": None})
        command = ["ldm", request.task.name, *to_argv(request.with_values(changes))]
        print(subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command))
        return 0
    with errors_as(FileFormatError, summary):
        check_inputs(info)
        request = make_replay_request(info, request, changes)
    prepared = request.task.prepare(request)
    models = load_models(request, threads=info["threads"])
    image, depth = reproduce_image(prepared, models, info)
    if args.output:
        output = depth if info.get("image") == "depth" else image
        write_png(args.output, output or image, info)
    with open_image(args.image) as recorded:
        difference = compare_results(info, recorded, image, depth)
        was_edited = hash_pixels(recorded) != info.get("sha256")
    print(difference or "identical")
    if difference is None:
        return 0
    size = prepared.get_output_size(models.base)
    changes_since = compare_infos(info, make_run_info(request, models, size))
    if was_edited:
        changes_since.append("the file was edited after it was made")
    for change in changes_since or ["no recorded setting has changed"]:
        print(f"  {change}")
    return 1
