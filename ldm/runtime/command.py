"""Run a command: parse its flags, configure logging, and print errors without a traceback."""

import argparse
import logging
import os
import sys
import warnings
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

from ldm.runtime.errors import (
    LdmError,
    WrongFamily,
    describe_error,
    find_nearest_name,
    is_out_of_memory,
)

__all__ = ["COMMANDS_BY_FUNCTION", "CommandParser", "log_to_stderr", "run_command"]

log = logging.getLogger(__name__)

# Loggers whose INFO messages are also shown without --verbose.
INFO_LOGGERS = (
    "ldm.runtime.command", "ldm.generate", "ldm.app", "ldm.commands", "ldm.loading.hub",
    "ldm.loading.published", "ldm.loading.replace_components", "ldm.pipelines.sdxl",
)  # fmt: skip

PATH_METAVARS = ("FILE", "DIR")
OUT_OF_MEMORY_HINT = "; these help: --n_samples 1, --vae-tile, a smaller --H and --W"
# Function of `ldm.pipelines` -> command, where the names differ.
COMMANDS_BY_FUNCTION = {
    "super_resolve": "upscale",
    "vary": "unclip",
    "upscale_rgbd": "upscale",
    "upscale_latent": "upscale",
}


class CommandParser(ArgumentParser):
    """An argument parser with `--verbose`; flags may be abbreviated, with `_` for `-`.

    Args:
        original_flags: Flags of the original scripts, whose abbreviations take precedence over
            those of other flags.
        takes_overrides: Whether `key=value` arguments are accepted, as `args.overrides`.

    Attributes:
        actions_by_flag: Argparse's action of each flag.
        given_flags: The flags in the last arguments of `parse`, spelled as declared.
    """

    def __init__(
        self, *, original_flags: Sequence[str] = (), takes_overrides: bool = False, **kwargs: Any
    ) -> None:
        self.actions_by_flag: dict[str, Action] = {}
        self.original_flags = frozenset(original_flags) | {"--help"}
        self.takes_overrides = takes_overrides
        self.given_flags: frozenset[str] = frozenset()
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.add_argument(
            "--verbose", action="store_true", help="log more, and show the traceback of an error"
        )

    def add_group(self, title: str) -> Callable[..., Action]:
        """Add a group of flags with a heading in `--help`; return its `add_argument`."""
        group = self.add_argument_group(title)

        def add(*names: str, **kwargs: Any) -> Action:
            return self._register_flags(group.add_argument(*names, **_add_path_type(kwargs)))

        return add

    def add_argument(self, *names: Any, **kwargs: Any) -> Action:
        """Add a flag as argparse does.

        `parse` accepts abbreviations of it, and suggests it for a misspelled flag. With the metavar
        FILE or DIR, its value is a path, in which `~` is the home directory.
        """
        return self._register_flags(super().add_argument(*names, **_add_path_type(kwargs)))

    def _register_flags(self, action: Action) -> Action:
        self.actions_by_flag |= dict.fromkeys(action.option_strings, action)
        if callable(action.type):
            action.type = _keep_messages(action.type)
        return action

    def parse(self, argv: Sequence[str] | None = None) -> Namespace:
        """Parse arguments; an error exits with status 2.

        Args:
            argv: Arguments; None = those of this process.
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        flags_end = arguments.index("--") if "--" in arguments else len(arguments)
        completed = [self._complete_flag(argument) for argument in arguments[:flags_end]]
        names = {argument.partition("=")[0] for argument in completed}
        self.given_flags = frozenset(names & self.actions_by_flag.keys())
        args, unparsed = self.parse_known_args(completed + arguments[flags_end:])
        overrides = [
            argument for argument in unparsed if "=" in argument and not argument.startswith("-")
        ]
        for argument in unparsed:
            if argument not in overrides or not self.takes_overrides:
                self._exit_for_unknown(argument)
        if self.takes_overrides:
            args.overrides = overrides
        return args

    def run(
        self, main: Callable[[Namespace], int | None], argv: Sequence[str] | None = None
    ) -> int:
        """Parse arguments (see `parse`), and run a command with them (see `run_command`)."""
        args = self.parse(argv)
        return run_command(lambda: main(args), self)

    def find_error_suffix(self, error: BaseException) -> str:
        """Return what the command line appends to the message of an error, "" for nothing.

        This is the flag of an invalid argument, such as " (--steps)", the command for a model of
        another task, or flags that save memory.
        """
        if is_out_of_memory(error):
            return OUT_OF_MEMORY_HINT if "--vae-tile" in self.actions_by_flag else ""
        if isinstance(error, WrongFamily):
            command = error.task and COMMANDS_BY_FUNCTION.get(error.task, error.task)
            return f" (ldm {command}, scripts/{command}.py)" if command else ""
        if isinstance(error, LdmError) and error.argument:
            flag = self._find_flag(error.argument)
            return f" ({flag})" if flag and flag not in str(error) else ""
        return ""

    def _find_flag(self, argument: str) -> str | None:
        """Return the flag of a library argument, as spelled by the user if it was given."""
        names = (argument, argument.removesuffix("s"))  # "loras": --lora
        flags = [flag for flag, action in self.actions_by_flag.items() if action.dest in names]
        return next((flag for flag in flags if flag in self.given_flags), next(iter(flags), None))

    def _complete_flag(self, argument: str) -> str:
        """Return an argument with its flag completed and spelled as declared."""
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            return argument
        normalized = name.replace("-", "_")
        matches: list[str] = []
        declared = self.actions_by_flag.keys()
        for flags in (self.original_flags & declared, declared):
            exact = [flag for flag in flags if flag.replace("-", "_") == normalized]
            matches = exact or [
                flag for flag in flags if flag.replace("-", "_").startswith(normalized)
            ]
            # Several spellings of one action are one match.
            by_action = {id(self.actions_by_flag[flag]): flag for flag in sorted(matches)[::-1]}
            matches = sorted(by_action.values())
            if len(matches) == 1:
                return matches[0] + equals + value
        if matches:
            self.error(f"`{name}` could be any of {', '.join(matches)}")
        return argument

    def _exit_for_unknown(self, argument: str) -> NoReturn:
        nearest = find_nearest_name(argument.partition("=")[0], self.actions_by_flag)
        suggestion = f", did you mean `{nearest}`?" if nearest else ""
        self.error(f"unknown argument `{argument}`{suggestion}")


def _add_path_type(kwargs: dict[str, Any]) -> dict[str, Any]:
    is_path = kwargs.get("metavar") in PATH_METAVARS
    return {"type": os.path.expanduser} | kwargs if is_path else kwargs


def _keep_messages(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap the parser of an argument, so that argparse shows the messages of LdmErrors."""

    @wraps(parse, updated=())  # argparse shows its name in messages
    def parse_argument(argument: str) -> Any:
        try:
            return parse(argument)
        except LdmError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


def run_command(main: Callable[[], int | None], parser: CommandParser) -> int:
    """Run the main function of a command; print any error on stderr, without a traceback.

    Args:
        main: The main function; returns the exit status, None = 0.
        parser: Parser that has parsed the arguments: `--verbose` logs more and shows tracebacks.

    Returns:
        The exit status: 1 after an error, 130 after Ctrl+C, 141 if stdout is a closed pipe.
    """
    verbose = "--verbose" in parser.given_flags
    # Spinning OpenMP threads make small models up to 50 times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log_to_stderr(logging.DEBUG if verbose else logging.WARNING)
    for name in INFO_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = main() or 0
            if sys.stdout is not None:  # it is None under pythonw
                sys.stdout.flush()
            return status
        except BrokenPipeError:  # such as by `| head`; Python flushes stdout once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            log.error("interrupted; finished files are kept")
            return 130
        except Exception as error:  # top level: show the message of any error
            text = describe_error(error) + parser.find_error_suffix(error)
            if not verbose and text.startswith(f"{type(error).__name__}:"):
                text += " (--verbose shows where)"
            log.error("%s: error: %s", parser.prog, text, exc_info=verbose)
            return 1


def log_to_stderr(level: int) -> None:
    """Send the log of this package to stderr, as stdout is for results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package_logger = logging.getLogger("ldm")
    package_logger.handlers = [handler]
    package_logger.setLevel(level)


def _show_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    prefix = "" if category is UserWarning else f"{category.__name__}: "
    log.warning("%s%s", prefix, str(message).partition("\n")[0])
