"""Convert between command lines and requests: the only module that parses argv for a task.

build_parser     task -> parser, with a flag for every option
parse_request    argv -> Request
to_argv          Request -> the command line that repeats it
hint             an error of the library -> what to do about it on the command line

It does not import torch, so that `--help` and mistakes in flags are fast.
"""

import argparse
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Container, Sequence
from typing import Any

from ldm.generate.groups import GROUPS
from ldm.generate.options import Option, Value, encode_option, options_of
from ldm.generate.request import Request
from ldm.generate.tasks import TASKS, Task
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import (
    ArgumentError,
    LdmError,
    MissingFile,
    WrongFamily,
    check_name,
    is_out_of_memory,
)

__all__ = ["add_options", "build_parser", "hint", "parse_request", "to_argv"]

# Flags of the original scripts: abbreviations of them, such as `--n_i`, keep their meaning although
# there are more flags now.
ORIGINAL_FLAGS = (
    "--prompt", "--outdir", "--steps", "--plms", "--dpm", "--fixed_code", "--ddim_eta", "--n_iter",
    "--H", "--W", "--C", "--f", "--n_samples", "--n_rows", "--scale", "--from-file", "--config",
    "--ckpt", "--seed", "--precision", "--repeat", "--device", "--torchscript", "--ipex", "--bf16",
    "--strength", "--init-img", "--negative-prompt",
)  # fmt: skip
MEMORY_HINT = "; these help: --n_samples 1, --vae-tile, a smaller --H and --W"
COMMANDS = {
    "vary": "unclip",
    "upscale_rgbd": "upscale",
    "upscale_latent": "upscale",
}  # function of `ldm.pipelines` -> command, where the names differ


def build_parser(task: Task, prog: str | None = None) -> CommandParser:
    """Build the parser of a task: its summary, and a flag for each option."""
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
        options: Options and their defaults by name.
        only: Names of the options to add; None = all of the group.
    """
    for name in options_of(group):
        if only is not None and name not in only:
            continue
        option, default = options[name]
        if not option.flags:
            continue
        kwargs: dict[str, Any] = {"dest": name, "help": option.help}
        if option.is_switch:
            kwargs["action"] = "store_false" if default else "store_true"
        else:
            kwargs |= {"type": _argparse_type(option), "metavar": option.metavar}
            kwargs |= {"default": default, "action": _Append if option.is_list else _Store}
            if option.choices:
                kwargs["choices"] = option.choices
            if option.const is not None:
                kwargs |= {"nargs": "?", "const": option.const}
        add(*option.flags, **kwargs)
        for flag, value in option.shortcuts.items():
            add(flag, dest=name, action=_Store, nargs=0, const=value, default=default,
                help=f"{option.flags[0]} {value}")  # fmt: skip


def parse_request(
    task: Task, argv: Sequence[str] | None = None, parser: CommandParser | None = None
) -> tuple[Request, Namespace]:
    """Parse a command line into a request; invalid flags exit with status 2 and a one-line error.

    Args:
        argv: Arguments without the program's name; None = those of this process.
        parser: From `build_parser`, possibly with more flags; None = build it.
    Returns:
        (request, values of all flags).
    """
    parser = parser or build_parser(task)
    args = parser.parse(argv)
    values = {name: getattr(args, name) for name in task.options()}
    try:
        return task.request(values), args
    except ArgumentError as error:
        parser.error(f"{error}{hint(error, task, parser.given_flags)}")


def to_argv(request: Request) -> list[str]:
    """Return the arguments that parse to this request, without the name of the command."""
    arguments: list[str] = []
    values = request.get_values()
    for name, (option, default) in request.task.options().items():
        value = values[name]
        if value == default:
            continue
        if not option.flags:
            arguments += value  # overrides, key=value
        elif option.is_switch:
            arguments.append(option.flags[0])
        else:
            arguments += [
                f"{option.flags[0]}={argument}" for argument in encode_option(option, value)
            ]
    return arguments


def find_flag(argument: str, task: Task | None = None, given: Container[str] = ()) -> str | None:
    """Find the flag of an argument of the library; None for `task` searches all tasks.

    Args:
        given: Flags on the command line, preferred to their synonyms.
    """
    for candidate in [task] if task else TASKS.values():
        options = candidate.options()
        name = argument if argument in options else argument.removesuffix("s")  # "loras": --lora
        if name in options and (flags := options[name][0].flags):
            return next((flag for flag in flags if flag in given), flags[0])
    return None


def hint(error: BaseException, task: Task | None = None, given: Container[str] = ()) -> str:
    """Return what to do about an error on the command line, to append to its message, or "".

    Args:
        given: See `find_flag`.
    """
    if is_out_of_memory(error):
        return MEMORY_HINT
    if isinstance(error, WrongFamily):
        command = error.task and COMMANDS.get(error.task, error.task)
        return f" (ldm {command}, scripts/{command}.py)" if command else ""
    if isinstance(error, LdmError) and error.argument:
        flag = find_flag(error.argument, task, given)
        return f" ({flag})" if flag and flag not in str(error) else ""
    return ""


def _argparse_type(option: Option) -> Callable[[str], Value]:
    """Return the parser of an option, with its errors as argparse needs them."""

    def parse(argument: str) -> Value:
        try:
            if option.choices:
                check_name("choice", argument, option.choices)
            return option.parse(option.read(argument))
        except (ArgumentError, MissingFile) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


class _Store(Action):
    """Store a value, or the constant of a shortcut such as `--plms`.

    The last value of a flag wins; different flags must not set different samplers.
    """

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        value, given = (self.const, f"{flag}") if self.nargs == 0 else (values, f"{flag} {values}")
        key = f"{self.dest}_flag"
        given_before = vars(namespace).get(key, given)
        is_other_flag = given_before.split()[0] != given.split()[0]
        if self.dest == "sampler" and is_other_flag and getattr(namespace, self.dest) != value:
            parser.error(f"{given} contradicts {given_before}")
        setattr(namespace, self.dest, value)
        setattr(namespace, key, given)


class _Append(Action):
    """Append a value to a tuple; the first one replaces the default."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is self.default:
            before = ()
        setattr(namespace, self.dest, (*before, values))
