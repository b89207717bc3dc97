"""Convert between command lines and requests.

build_parser     task -> parser, with a flag for every option
parse_request    argv -> Request
to_argv          Request -> argv that reproduces it

This module does not import torch, so that `--help` and mistakes in flags are reported fast.
"""

from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.generate.groups import GROUP_HEADINGS
from ldm.generate.options import Option, Value, encode_option, get_options
from ldm.generate.request import Request
from ldm.generate.tasks import Task
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import ArgumentError, check_name

__all__ = ["add_options", "build_parser", "parse_request", "to_argv"]

# Flags of the original scripts. Their abbreviations, such as `--n_i`, keep their meaning, although
# newer flags begin with the same letters.
ORIGINAL_FLAGS = (
    "--prompt", "--outdir", "--steps", "--plms", "--dpm", "--fixed_code", "--ddim_eta", "--n_iter",
    "--H", "--W", "--C", "--f", "--n_samples", "--n_rows", "--scale", "--from-file", "--config",
    "--ckpt", "--seed", "--precision", "--repeat", "--device", "--torchscript", "--ipex", "--bf16",
    "--strength", "--init-img", "--negative-prompt",
)  # fmt: skip

ORIGINAL_PRECISIONS = ("full", "autocast")


def build_parser(task: Task, prog: str | None = None) -> CommandParser:
    """Build the parser of a task: its summary, and a flag for each option."""
    parser = CommandParser(
        prog=prog,
        description=task.summary,
        usage="%(prog)s [flags] [key=value ...]",
        original_flags=ORIGINAL_FLAGS,
        takes_overrides=True,
    )
    options = task.options
    for name, group in task.groups.items():
        add_options(
            parser.add_group(GROUP_HEADINGS[name]),
            {name: options[name] for name in get_options(group)},
        )
    return parser


def add_options(add_argument: Callable[..., Action], options: Mapping[str, Option]) -> None:
    """Add the flags of options.

    Args:
        add_argument: Method of a parser or of a group of flags.
        options: Options by name.
    """
    for name, option in options.items():
        if not option.flags:
            continue
        kwargs: dict[str, Any] = {"dest": name, "help": option.help, "default": option.default}
        if option.is_switch:
            action = "store_false" if option.default else "store_true"
            kwargs |= {"action": BooleanOptionalAction if option.is_negatable else action}
        else:
            kwargs |= {"type": _make_argparse_type(option), "metavar": option.metavar}
            kwargs |= {"action": _StoreAction}
            if option.is_list:
                kwargs |= {"default": [*(option.default or ())], "action": "append"}
            if option.choices:
                kwargs["choices"] = option.choices
            if option.const is not None:
                kwargs |= {"nargs": "?", "const": option.const}
        add_argument(*option.flags, **kwargs)
        for flag, value in option.shortcuts.items():
            add_argument(
                flag, dest=name, action=_StoreAction, nargs=0, const=value, default=option.default,
                help=f"{option.flags[0]} {value}",
            )  # fmt: skip


def parse_request(
    task: Task, argv: Sequence[str] | None = None, parser: CommandParser | None = None
) -> Request:
    """Parse a command line into a request; invalid flags exit with status 2 and a one-line error.

    Args:
        argv: Arguments without the program's name; None = those of this process.
        parser: Parser from `build_parser`; None = a new one.
    """
    parser = parser or build_parser(task)
    args = parser.parse(argv)
    values = {name: getattr(args, name) for name in task.options}
    try:
        return task.build_request(values)
    except ArgumentError as error:
        parser.error(f"{error}{parser.find_error_suffix(error)}")


def to_argv(request: Request) -> list[str]:
    """Return the arguments that `parse_request` parses to this request."""
    arguments: list[str] = []
    values = request.get_values()
    for name, option in request.task.options.items():
        value = values[name]
        if value == option.default:
            continue
        if not option.flags:
            arguments += value  # overrides, key=value
        elif option.is_switch:
            is_negated = option.is_negatable and not value
            arguments.append(option.flags[0].replace("--", "--no-" if is_negated else "--", 1))
        else:
            arguments += [
                f"{option.flags[0]}={argument}" for argument in encode_option(option, value)
            ]
    return arguments


def _make_argparse_type(option: Option) -> Callable[[str], Value]:
    """Return the argparse type of an option: a function that parses an argument."""

    def parse(argument: str) -> Value:
        if option.choices:
            check_name("choice", argument, option.choices)
        return option.parse(option.expand(argument))

    return parse


class _StoreAction(Action):
    """Store a value, or the constant of a shortcut such as `--plms`.

    The last value of a flag wins. Different flags must not set different values, except that
    `--bf16` overrides the precisions of the original in either order.
    """

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        value, typed = (self.const, f"{flag}") if self.nargs == 0 else (values, f"{flag} {values}")
        key = f"{self.dest}_flag"
        previously_typed = vars(namespace).get(key, typed)
        previous_value = getattr(namespace, self.dest)
        is_other_flag = previously_typed.split()[0] != typed.split()[0]
        if is_other_flag and self.dest in ("sampler", "precision") and previous_value != value:
            if not {previous_value, value} & {*ORIGINAL_PRECISIONS}:
                parser.error(f"{typed} contradicts {previously_typed}")
            if self.nargs != 0:
                return
        setattr(namespace, self.dest, value)
        setattr(namespace, key, typed)
