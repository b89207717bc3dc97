"""The `ldm` command: one subcommand for each task and each program."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from ldm.generate.tasks import TASKS
from ldm.runtime.errors import nearest_name
from ldm.runtime.version import __version__

__all__ = ["main", "main_of_alias"]

# Each is a module of this package with `main(argv, prog)`; tasks are all `generate`.
PROGRAMS = {
    "replay": "make an image again from what its PNG says, and compare",
    "app": "all tasks in the browser",
    "train": "train or fine-tune a model",
    "convert": "convert between checkpoints and diffusers folders, merge LoRAs",
    "inspect-checkpoint": "say what is in a checkpoint, without running anything in it",
    "check-data": "check a data set, pack it into shards",
    "read-watermark": "say which invisible watermark an image carries",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ldm COMMAND …`; returns the exit status.

    Args:
        argv: the command and its words; None = those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0].replace("_", "-") if words else "--help"
    if name in ("--help", "-h", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in TASKS and name not in PROGRAMS:
        near = nearest_name(name, [*TASKS, *PROGRAMS])
        hint = f", did you mean `{near}`?" if near else ""
        print(f"ldm: error: unknown command `{words[0]}`{hint} (ldm --help)", file=sys.stderr)
        return 2
    program = Path(sys.argv[0])
    is_script = program.stem.replace("_", "-").removeprefix("ldm-") == name
    prog = program.name if is_script else f"ldm {name}"
    module = import_module(f"ldm.commands.{_module_of(name)}")
    run: Callable[..., int] = module.main
    return run(name, words[1:], prog) if name in TASKS else run(words[1:], prog)


def main_of_alias() -> int:
    """Run the command that this program is called by: `ldm-txt2img` is `ldm txt2img`."""
    return main([Path(sys.argv[0]).stem.removeprefix("ldm-"), *sys.argv[1:]])


def _module_of(name: str) -> str:
    return "generate" if name in TASKS else name.replace("-", "_")


def _help() -> str:
    """The list of all commands."""
    tasks = {name: task.summary.splitlines()[0].rstrip(".") for name, task in TASKS.items()}
    lines = [f"  {name:<20}{text}" for name, text in {**tasks, **PROGRAMS}.items()]
    return "\n".join(
        ["usage: ldm COMMAND [flags]", "", *lines, "", "ldm COMMAND --help says more."]
    )
