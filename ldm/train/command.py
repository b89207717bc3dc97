"""The command line of training, in the grammar of the original's `main.py`.

    -b a.yaml b.yaml -t [bool] -n NAME -r [RUN] key.sub=value --ARGUMENT_OF_LIGHTNING value

    argv -> parse -> Namespace -> work: configs, processes, a folder -> Run -> train, export, …

Nothing here imports torch before it is needed, so that --help answers at once.
"""

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.runtime.errors import unknown_name
from ldm.runtime.ranks import rank_and_world_size
from ldm.train.distributed import launch
from ldm.train.runs import run_folder

if TYPE_CHECKING:
    from ldm.train.config.settings import Settings

__all__ = ["PARSER", "parse", "work"]

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
NUMBER = re.compile(r"-\d+")
EPILOG = """\
Any other --NAME VALUE is an argument of Lightning's Trainer (--gpus 0,1, --max_epochs 3 --max_steps
1000 --precision bf16 …) and means lightning.trainer.NAME=VALUE. On the signal SIGUSR1 a process of
the run saves at once; on SIGTERM and SIGINT the run ends after a step, and can be continued.
"""


def boolean(text: str) -> bool:
    """yes, true, t, y, 1 or their opposites, as the original takes them."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"`{text}` is neither true nor false")
    return text.lower() in TRUE


def amount(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number >= 0")
    return int(text)


# Options whose value may be left out, and what they mean then.
OPTIONAL = {
    **dict.fromkeys(
        (
            "--train",
            "--debug",
            "--validate",
            "--dry-run",
            "--no-test",
            "--scale_lr",
            "--allow-commands",
        ),
        "true",
    ),
    **dict.fromkeys(("--resume", "--name", "--project"), ""),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a model from a config in the original's format.", epilog=EPILOG
    )
    add = parser.add_argument
    switch: dict[str, Any] = {"type": boolean, "default": False, "metavar": "BOOL"}
    add("-b", "--base", nargs="*", default=[], help="config files (YAML), later ones over earlier")
    add("-t", "--train", **switch, help="train (else: check the config, or export)")
    add("-n", "--name", default="", help="name of the run (default: the last config's)")
    text = "go on with a run: its folder, or a state in it; alone: the newest run of this name"
    add("-r", "--resume", metavar="RUN", help=text)
    add("-f", "--postfix", default="", help="appended to the name of the run")
    add("-l", "--logdir", type=Path, default=Path("logs"), help="folder of runs (default: logs)")
    add("-s", "--seed", type=int, help="of weights, order and noise (default: 23)")
    text = (
        "learning rate = accumulate x ranks x batch x base_learning_rate (default: if the config "
        "names no lightning.optimizer)"
    )
    add("--scale_lr", type=boolean, metavar="BOOL", help=text)
    add("--validate", **switch, help="print the loss on held-out data, raw and averaged weights")
    add("--dry-run", **switch, help="print the whole config and the memory that it needs")
    add("--nproc", type=amount, default=0, help="processes on this machine, with or without GPUs")
    text = "shards may come from `pipe:COMMAND`, which runs whatever the config says"
    add("--allow-commands", **switch, help=text)
    add("--threads", type=amount, help="of the CPU, for each process")
    text = "run in LOGDIR/debug_runs; show tracebacks, and open pdb if there is a terminal"
    add("-d", "--debug", **switch, help=text)
    add("--no-test", **switch | {"help": argparse.SUPPRESS})
    add("-p", "--project", help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="key.sub=value", help="laid over the configs")
    return parser


PARSER = _parser()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; `base` has config files only, `overrides` everything that is laid over them."""
    words = list(sys.argv[1:] if argv is None else argv)
    kept = list(words)
    ours: list[str] = []
    trainer: dict[str, str] = {}
    while words:
        word = words.pop(0)
        name, given, value = word.partition("=")
        if not word.startswith("-") or NUMBER.fullmatch(word):
            ours.append(word)
            continue
        option = _option(name)
        if option in OPTIONAL:
            if not given:
                takes = bool(words) and _may_be_value(option, words[0])
                value = words.pop(0) if takes else OPTIONAL[option]
            ours.append(f"{option}={value}")
        elif option:
            ours.append(word)
        else:
            if not given:
                value = words.pop(0) if words and _may_be_value("", words[0]) else "true"
            trainer[name.lstrip("-")] = value
    args = PARSER.parse_intermixed_args(ours)
    overrides = [word for word in args.base if "=" in word] + args.overrides
    args.base = [word for word in args.base if "=" not in word]
    args.overrides = [*_trainer_flags(args, trainer), *overrides]
    args.argv = kept
    return args


def work(args: argparse.Namespace) -> Iterator[str]:
    """Does what the flags say; gives the lines to print: a path, figures, or a config."""
    if not args.base and args.resume is None:
        PARSER.error("-b/--base is needed, or -r/--resume with the folder of a run")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("ldm").handlers = [handler]
    is_first = rank_and_world_size()[0] == 0  # the others would say the same
    logging.getLogger("ldm").setLevel(logging.INFO if is_first else logging.WARNING)
    try:
        if args.dry_run:
            yield from _dry_run(args, _read(args, run_folder.find(args)))
        else:
            old = launch.agreed(lambda starters: run_folder.find(args, starters))
            settings = _read(args, old)
            launch.launch(settings.raw, args.nproc, args.argv)
            yield from _run(args, settings, old)
    except Exception:
        if args.debug and sys.stdin.isatty():
            import pdb

            pdb.post_mortem()
        raise


def _read(args: argparse.Namespace, old: run_folder.Old | None) -> "Settings":
    """The settings of the run; errors in them are reported before anything is started or made."""
    from ldm.train.config import settings

    raw = run_folder.read(args, old)
    result = settings.read_settings(raw)
    settings.check_complete(raw, "model.target", "data.params.train", "data.params.batch_size")
    if args.train:
        settings.check_complete(raw, "model.base_learning_rate")
    return result


def _run(
    args: argparse.Namespace, settings: "Settings", old: run_folder.Old | None
) -> Iterator[str]:
    import torch

    from ldm.loading.config import format_yaml
    from ldm.train.loop import Run
    from ldm.train.monitoring import validation

    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder = launch.agreed(lambda starters: run_folder.begin(args, old, starters))
    try:
        run = Run(settings, folder, text=format_yaml(settings.raw), commands=args.allow_commands)
    except Exception:
        run_folder.discard(folder)
        raise
    if old and old.state:
        run.resume(old.state)
    if run.ranks.is_first and args.train:
        run_folder.note(args, folder, settings.raw)
    if args.train:
        run.train(begun=lambda: run_folder.link(args, folder))
    elif old and not args.validate:
        run.export()
    if args.validate:
        figures = validation.validate(run)
        if not figures:
            raise ValueError("--validate needs held-out data, `data.params.validation`")
        yield from (f"{name} {value:.6f}" for name, value in figures.items())
    elif run.ranks.is_first:
        written = [run.last.with_suffix(f".{kind}") for kind in ("safetensors", "ckpt")]
        done = [str(path) for path in written if path.exists()] if args.train or old else []
        yield from done or ["the config fits"]
    run.ranks.stop()


def _dry_run(args: argparse.Namespace, settings: "Settings") -> Iterator[str]:
    from ldm.loading.config import format_yaml
    from ldm.train import estimate

    yield format_yaml(settings.raw)
    yield from estimate.describe(settings, processes=launch.processes(settings.raw, args.nproc))


def _option(name: str) -> str:
    """The long name of one of our options, also of an abbreviation; "" for another's."""
    table = {
        spelling: action.option_strings[-1]
        for action in PARSER._actions
        for spelling in action.option_strings
    }
    near = {table[spelling] for spelling in table if spelling.startswith(name) and name[:2] == "--"}
    return table.get(name) or (near.pop() if len(near) == 1 else "")


def _may_be_value(option: str, word: str) -> bool:
    """Whether the word after an option with an optional value is that value."""
    if OPTIONAL.get(option) == "true":
        return word.lower() in TRUE + FALSE
    is_override = "=" in word and not Path(word).exists()
    return NUMBER.fullmatch(word) is not None or not (word.startswith("-") or is_override)


def _trainer_flags(args: argparse.Namespace, given: dict[str, str]) -> list[str]:
    """Overrides for arguments of Lightning's Trainer, and for our own options that mean some."""
    if "resume_from_checkpoint" in given:
        args.resume = given.pop("resume_from_checkpoint")
    if given:
        from ldm.train.config import lightning, schema

        known = [*schema.fields_of(schema.Trainer), *lightning.KNOWN["trainer"]]
        for name in given:
            if name not in known:
                options = [spelling.lstrip("-") for spelling in PARSER._option_string_actions]
                raise unknown_name("option", name, known + options, "command line")
    for name in ("seed", "scale_lr"):
        if getattr(args, name) is not None:
            given[name] = str(getattr(args, name)).lower()
    return [f"lightning.trainer.{name}={value}" for name, value in given.items()]
