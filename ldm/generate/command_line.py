"""argv <-> Request: the only place that knows flags. Nothing here imports torch.

build_parser     task -> parser; every option of the task is a flag
parse_request    argv -> Request
to_argv          Request -> the command line that makes it again
hint             an error of the library -> what to do about it on the command line
"""

import argparse
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from ldm.generate.options import Option, Value, encode_option, options_of
from ldm.generate.request import GROUPS, Request
from ldm.generate.tasks import TASKS, Task
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import ArgumentError, MissingFile, WrongFamily, is_out_of_memory

__all__ = ["add_options", "build_parser", "hint", "parse_request", "to_argv"]

# Flags of the original scripts, whose abbreviations keep their meaning.
ORIGINAL_FLAGS = (
    "--prompt", "--outdir", "--steps", "--plms", "--dpm", "--fixed_code", "--ddim_eta", "--n_iter",
    "--H", "--W", "--C", "--f", "--n_samples", "--n_rows", "--scale", "--from-file", "--config",
    "--ckpt", "--seed", "--precision", "--repeat", "--device", "--torchscript", "--ipex", "--bf16",
    "--strength",
)  # fmt: skip
MEMORY_HINT = "; these help: --n_samples 1, --vae-tile, a smaller --H and --W"
# Functions of `ldm.pipelines` that serve a family, as commands.
COMMANDS = {"vary": "unclip"}


def build_parser(task: Task, prog: str | None = None) -> CommandParser:
    """The parser of one task: its summary and a flag for each option."""
    parser = CommandParser(
        prog=prog,
        description=task.summary,
        usage="%(prog)s [flags] [key=value ...]",
        original=ORIGINAL_FLAGS,
        overrides=True,
    )
    options = task.options()
    for name, group in task.groups().items():
        add_options(parser.add_group(GROUPS[name]), group, options)
    parser.add_argument(
        "--verbose", action="store_true", help="log more, and show the traceback of an error"
    )
    return parser


def add_options(
    add: Callable[..., Action],
    group: type,
    options: dict[str, tuple[Option, Value]],
    only: Sequence[str] | None = None,
) -> None:
    """Add the flags of a group of options.

    Args:
        add: `add_argument` of a parser or of a group of flags.
        options: rows and defaults by name.
        only: names of the options to add; None = all of the group.
    """
    for name in options_of(group):
        row, default = options[name]
        if not row.flags or (only is not None and name not in only):
            continue
        settings: dict[str, Any] = {"dest": name, "help": row.help}
        if row.is_switch:
            settings["action"] = "store_false" if default else "store_true"
        else:
            settings |= {"type": _argparse_type(row), "metavar": row.metavar, "default": default}
            settings["action"] = _Append if row.is_list else _Store
            if row.choices:
                settings["choices"] = row.choices
            if row.const is not None:
                settings |= {"nargs": "?", "const": row.const}
        add(*row.flags, **settings)
        for flag, value in row.shortcuts.items():
            add(flag, dest=name, action=_StoreShortcut, nargs=0, const=value, default=default,
                help=f"{row.flags[0]} {value}")  # fmt: skip


def parse_request(
    task: Task, argv: Sequence[str] | None = None, parser: CommandParser | None = None
) -> tuple[Request, Namespace]:
    """The request that a command line is; exits with status 2 and one line about a mistake.

    Args:
        parser: of `build_parser`, with flags of the program's own beside those of the task.
    Returns:
        (request, all flags by name).
    """
    parser = parser or build_parser(task)
    args = parser.parse(argv)
    values = {name: getattr(args, name) for name in task.options()}
    try:
        return task.request(values), args
    except ArgumentError as error:
        parser.error(f"{error}{hint(error, task)}")


def to_argv(request: Request) -> list[str]:
    """The words that give this request again, without the name of the command."""
    words: list[str] = []
    values = request.values()
    for name, (row, default) in request.task.options().items():
        value = values[name]
        if value == default:
            continue
        if not row.flags:
            words += value  # overrides, key=value
        elif row.is_switch:
            words.append(row.flags[0])
        else:
            words += [f"{row.flags[0]}={word}" for word in encode_option(row, value)]
    return words


def flag_of(argument: str, task: Task | None = None) -> str | None:
    """The flag that sets an argument of the library, in this task or in any; None = no flag."""
    for one in [task] if task else TASKS.values():
        row, _ = one.options().get(argument, (None, None))
        if row is not None and row.flags:
            return row.flags[0]
    return None


def hint(error: BaseException, task: Task | None = None) -> str:
    """What a user of the command line can do about an error, to be put behind its message."""
    if is_out_of_memory(error):
        return MEMORY_HINT
    if isinstance(error, WrongFamily):
        command = error.task and COMMANDS.get(error.task, error.task)
        return f" (ldm {command}, scripts/{command}.py)" if command else ""
    if isinstance(error, ArgumentError | MissingFile) and error.argument:
        flag = flag_of(error.argument, task)
        return f" ({flag})" if flag and flag not in str(error) else ""
    return ""


def _argparse_type(row: Option) -> Callable[[str], Value]:
    """`parse` of a row, whose message argparse shows as it is."""

    def parse(word: str) -> Value:
        try:
            return row.parse(word)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


class _Store(Action):
    """Store a value and the flag that gave it."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        _store_once(self, parser, namespace, values, f"{flag} {values}")


class _StoreShortcut(Action):
    """Store the constant that a flag without a word stands for."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        _store_once(self, parser, namespace, self.const, f"{flag}")


class _Append(Action):
    """Append a value to a tuple, which begins empty whatever the default."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is self.default:
            before = ()
        setattr(namespace, self.dest, (*before, values))


def _store_once(
    action: Action, parser: ArgumentParser, namespace: Namespace, value: Value, words: str
) -> None:
    """Store a value; a sampler that was given twice must be the same twice."""
    given = f"{action.dest} given as"
    before = vars(namespace).get(given)
    if action.dest == "sampler" and before and getattr(namespace, action.dest) != value:
        parser.error(f"{words} contradicts {before}")
    setattr(namespace, action.dest, value)
    setattr(namespace, given, words)
