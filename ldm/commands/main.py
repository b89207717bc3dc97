"""The `ldm` command, with a subcommand for each task and each program."""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from ldm.generate.tasks import TASKS
from ldm.prompts import PromptWarning
from ldm.runtime.errors import find_nearest_name
from ldm.runtime.version import __version__

__all__ = ["main", "main_of_alias"]

# Each is a module of this package with `main(argv, prog)`; all tasks share the module `generate`.
PROGRAMS = {
    "replay": "reproduce an image from its metadata, and compare",
    "app": "serve all tasks as a web page",
    "train": "train or fine-tune a model",
    "evaluate": "make images for many prompts, score them, plot FID against CLIP score",
    "download": "list published weights, download them by name",
    "convert": "convert between checkpoints and diffusers folders, merge LoRAs",
    "merge": "merge checkpoints: weighted sum, added difference, block weights",
    "extract-lora": "extract a LoRA from the difference of two models",
    "merge-lora": "join LoRAs, or reduce the rank of one",
    "inspect-checkpoint": "describe a checkpoint, without executing pickled code",
    "check-data": "check a dataset, pack it into shards",
    "read-watermark": "print which invisible watermark is in an image",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ldm COMMAND …` (None = the arguments of this process); return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # Characters that the console cannot show must not end a run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", category=PromptWarning)  # programs have their own messages
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0].replace("_", "-") if arguments else "--help"
    if arguments[1:] == ["--version"]:
        name = "--version"
    if name in ("--help", "-h", "help"):
        print(_format_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in TASKS and name not in PROGRAMS:
        message = f"unknown command `{arguments[0]}`{_suggest(name)} (ldm --help)"
        print(f"ldm: error: {message}", file=sys.stderr)
        return 2
    program = Path(sys.argv[0])
    is_script = program.stem.replace("_", "-").removeprefix("ldm-") == name
    prog = program.name if is_script else f"ldm {name}"
    module = "generate" if name in TASKS else name.replace("-", "_")
    run: Callable[..., int] = import_module(f"ldm.commands.{module}").main
    return run(name, arguments[1:], prog) if name in TASKS else run(arguments[1:], prog)


def main_of_alias() -> int:
    """Run the command in this program's name: `ldm-txt2img` is `ldm txt2img`."""
    return main([Path(sys.argv[0]).stem.removeprefix("ldm-"), *sys.argv[1:]])


def _suggest(name: str) -> str:
    """Suggest commands whose name, or a word of it (`inspect`, `lora`), is similar."""
    words = {command: (command, *command.split("-")) for command in (*TASKS, *PROGRAMS)}
    nearest = find_nearest_name(name, chain.from_iterable(words.values()))
    similar = [f"`{command}`" for command in words if nearest in words[command]]
    return f", did you mean {' or '.join(similar)}?" if similar else ""


def _format_help() -> str:
    tasks = {name: task.summary.splitlines()[0].rstrip(".") for name, task in TASKS.items()}
    lines = [f"  {name:<20}{text}" for name, text in {**tasks, **PROGRAMS}.items()]
    return "\n".join(["usage: ldm COMMAND [flags]", "", *lines, "", "See ldm COMMAND --help."])


if __name__ == "__main__":  # `python -m ldm.commands.main`
    raise SystemExit(main())
