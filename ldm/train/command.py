"""The command line of training, with the options of the original's `main.py`.

    ldm train --base configs/demo/text2img.yaml -t data.params.batch_size=64
    ldm train --base configs/demo/text2img.yaml configs/train/lora.yaml -t
    ldm train --base my.yaml -t --gpus 0,1,           two GPUs
    ldm train -t --resume logs/lora                   resumes the newest run named `lora`
    torchrun --nnodes 2 --nproc-per-node 8 … -m ldm.train.command --base my.yaml -t

Later files override earlier ones, `key.sub=value` overrides all. Runs are in LOGDIR/TIME_NAME.

    argv -> parse -> TrainRequest -> settings, processes, a run folder -> Run -> train, export, …

Imports of torch are deferred, so that --help is fast.
"""

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.runtime.command import log_to_stderr
from ldm.runtime.errors import describe_error, make_unknown_name_error
from ldm.runtime.files import disk_errors_about
from ldm.runtime.ranks import get_rank_and_world_size
from ldm.train.distributed import launch
from ldm.train.request import TrainRequest
from ldm.train.runs import run_folder

if TYPE_CHECKING:
    from ldm.train.config.settings import Settings

__all__ = ["main", "parse"]

TRUE_WORDS, FALSE_WORDS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
NEGATIVE_NUMBER = re.compile(r"-\d+")
TIME_OVERRIDE = re.compile(r"=(\d+(?::\d+)+)$")
SWITCHES = ("--train", "--debug", "--validate", "--dry-run", "--no-test", "--scale_lr",
            "--allow-commands")  # fmt: skip
# Options whose value may be omitted, and the value that this implies.
IMPLICIT_VALUES = {**dict.fromkeys(SWITCHES, "true"), "--resume": "", "--name": "", "--project": ""}
# Keys of the config, by options of the original's forks, of kohya's scripts and of diffusers.
FOREIGN_OPTIONS = {
    **dict.fromkeys(
        ("finetune_from", "actual_resume", "pretrained_model_name_or_path"),
        "model.params.ckpt_path",
    ),
    **dict.fromkeys(("data_root", "train_data_dir"), "data.params.train.root"),
    "init_word": "lightning.textual_inversion.initializer_words",
    "learning_rate": "model.base_learning_rate",
    "train_batch_size": "data.params.batch_size",
    "max_train_steps": "lightning.trainer.max_steps",
    "network_dim": "lightning.lora.rank",
    "network_alpha": "lightning.lora.alpha",
}
EPILOG = """\
Any other --NAME VALUE is an argument of Lightning's Trainer (--gpus 0,1, --max_epochs 3 --max_steps
1000 --precision bf16 …) and means lightning.trainer.NAME=VALUE. On the signal SIGUSR1 the run saves
its state after the current step; on SIGTERM and SIGINT it ends after that step, and can be resumed.
"""


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None = the arguments of this process.
        prog: Name of the program, for messages.
    Returns:
        The exit code: 0, or 1 after an error, which is printed in one line.
    """
    debug = False
    try:
        request = parse(argv, prog)
        debug = request.debug
        for line in _run_request(request):
            print(line)
    except (ValueError, KeyError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if not debug:
            print(f"{prog}: error: {describe_error(error)}", file=sys.stderr)
            return 1
        if sys.stdin.isatty():
            import pdb

            pdb.post_mortem(error.__traceback__)
        raise
    return 0


def parse(argv: Sequence[str] | None = None, prog: str = "train.py") -> TrainRequest:
    """Parse a command line; exit with status 2 if argparse refuses it.

    Raises:
        ValueError: An option is unknown.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, spellings = _build_parser(prog)
    our_arguments, trainer_options = _split_arguments(arguments, spellings)
    args = parser.parse_intermixed_args(our_arguments)
    resume = trainer_options.pop("resume_from_checkpoint", args.resume)
    if args.resume not in (None, resume):
        raise ValueError("--resume and --resume_from_checkpoint name two runs: give one")
    if trainer_options:
        _check_trainer_options(trainer_options, spellings)
    if args.seed is not None:
        trainer_options["seed"] = str(args.seed)
    if args.scale_lr is not None:
        trainer_options["scale_lr"] = str(args.scale_lr).lower()
    configs = [argument for argument in args.base if "=" not in argument]
    overrides = [f"lightning.trainer.{name}={value}" for name, value in trainer_options.items()]
    overrides += [argument for argument in args.base if "=" in argument] + args.overrides
    # Quoted, as YAML reads 1:12:00:00 as a number in base 60.
    overrides = [TIME_OVERRIDE.sub(r"='\1'", override) for override in overrides]
    if not configs and resume is None:
        parser.error("-b/--base is needed, or -r/--resume with the folder of a run")
    if resume and (args.name or args.postfix):
        raise ValueError(f"`{resume}` keeps its name: leave out --name and --postfix")
    name = (args.name or (Path(configs[-1]).stem if configs else "")) + args.postfix
    if Path(name).name != name:
        raise ValueError(f"the name `{name}` of the run has a `/`: give the folder as --logdir")
    return TrainRequest(
        configs=tuple(configs),
        overrides=tuple(overrides),
        train=args.train,
        validate=args.validate,
        dry_run=args.dry_run,
        name=name,
        resume=resume,
        logdir=Path(args.logdir, "debug_runs" if args.debug else ""),
        processes=args.nproc,
        threads=args.threads,
        allow_commands=args.allow_commands,
        debug=args.debug,
        argv=tuple(arguments),
    )


def _run_request(request: TrainRequest) -> Iterator[str]:
    """Run a request; yield lines to print: paths, losses, or a config."""
    # Processes other than the first log warnings only.
    log_to_stderr(logging.INFO if get_rank_and_world_size()[0] == 0 else logging.WARNING)
    if request.dry_run:
        yield from _describe_run(request)
        return
    existing_run = launch.run_on_main_process(
        lambda torchrun_ids: run_folder.find_run(request, torchrun_ids)
    )
    settings = _read_settings(request, existing_run)
    launch.launch(settings.devices, request.processes, request.argv)
    yield from _train_or_export(request, settings, existing_run)


def _read_settings(
    request: TrainRequest, existing_run: run_folder.ExistingRun | None
) -> "Settings":
    """Read and check the settings, before any process is started or folder created."""
    from ldm.train.batches.sources import check_data
    from ldm.train.config.settings import read_settings, require_keys

    settings = read_settings(run_folder.read_config(request, existing_run))
    required = ["model.target", "data.params.train", "data.params.batch_size"]
    if request.train:
        required.append("model.base_learning_rate")
    require_keys(settings.config, *required)
    settings.check_strategy(launch.count_processes(settings.devices, request.processes))
    check_data(settings.data, allow_commands=request.allow_commands)
    if request.train and not {"root", "hub", "length"} & settings.data.train.keys():
        settings.convert_epochs_to_steps(None)  # raises for numbers of epochs
    if request.validate and not settings.data.validation:
        raise ValueError("--validate needs held-out data, `data.params.validation`")
    return settings


def _describe_run(request: TrainRequest) -> Iterator[str]:
    """Yield the whole config, and an estimate of the memory of the run."""
    from ldm.train import memory_estimate

    settings = _read_settings(request, run_folder.find_run(request))
    world_size = launch.count_processes(settings.devices, request.processes)
    yield from memory_estimate.describe_run(settings, world_size=world_size)


def _train_or_export(
    request: TrainRequest, settings: "Settings", existing_run: run_folder.ExistingRun | None
) -> Iterator[str]:
    """Train, export or validate a run."""
    import torch

    from ldm.train.loop import train
    from ldm.train.monitoring.validation import validate
    from ldm.train.run import build_run
    from ldm.train.runs.exports import export

    torch.set_num_threads(request.threads or torch.get_num_threads())
    folder = launch.run_on_main_process(
        lambda torchrun_ids: run_folder.prepare_folder(request, existing_run, torchrun_ids)
    )
    try:
        run = build_run(settings, folder, allow_commands=request.allow_commands)
    except Exception:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
        raise
    if existing_run and existing_run.state_path:
        run.resume(existing_run.state_path)
    with disk_errors_about(folder):
        if run.ranks.is_main_process and request.train:
            run_folder.save_config(folder, settings.config)
        if request.train:
            train(run, on_start=lambda: run_folder.link_newest_run(request, folder))
        elif existing_run and not request.validate:
            export(run)
    if request.validate:
        lines = [f"{name} {value:.6f}" for name, value in validate(run).items()]
    elif request.train or existing_run:
        exports = [run.checkpoints / f"last.{suffix}" for suffix in ("safetensors", "ckpt")]
        lines = [str(path) for path in exports if path.exists()]
    else:
        lines = ["the config is valid"]
    if run.ranks.is_main_process:
        yield from lines
    run.ranks.disconnect()


def _build_parser(prog: str) -> tuple[argparse.ArgumentParser, dict[str, str]]:
    """Return the parser of our own options, and {spelling: long name}."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Train a model from a config in the original's format.",
        epilog=EPILOG,
    )  # fmt: skip
    spellings = {"-h": "--help", "--help": "--help"}

    def add(*names: str, **options: Any) -> None:
        parser.add_argument(*names, **options)
        spellings.update(dict.fromkeys(names, names[-1]))

    def add_switch(*names: str, help: str) -> None:
        add(*names, type=_parse_bool, default=False, metavar="BOOL", help=help)

    add(
        "-b",
        "--base",
        nargs="*",
        action="extend",
        default=[],
        help="config files (YAML), later ones override earlier ones; a diffusers folder gives "
        "its config and the initial weights",
    )
    add_switch("-t", "--train", help="train (else: check the config, or export)")
    add("-n", "--name", default="", help="name of the run (default: the last config's)")
    text = "run to resume: its folder, or a state in it; without RUN: the newest of this name"
    add("-r", "--resume", metavar="RUN", help=text)
    add("-f", "--postfix", default="", help="appended to the name of the run")
    add("-l", "--logdir", type=expanduser, default="logs", help="folder of runs (default: logs)")
    add("-s", "--seed", type=int, help="seed of weights, data order and noise (default: 23)")
    text = (
        "learning rate = accumulate x ranks x batch x base_learning_rate (default: if the config "
        "has no lightning.optimizer)"
    )
    add("--scale_lr", type=_parse_bool, metavar="BOOL", help=text)
    add_switch("--validate", help="print the losses on held-out data, with raw and EMA weights")
    add_switch("--dry-run", help="print the whole config and the memory of the run")
    add(
        "--nproc",
        type=_parse_count,
        default=0,
        help="processes on this machine, with or without GPUs",
    )
    text = "allow shards from `pipe:COMMAND`, which runs any command in the config"
    add_switch("--allow-commands", help=text)
    add("--threads", type=_parse_count, help="CPU threads of each process")
    text = "run in LOGDIR/debug_runs; show tracebacks, and open pdb if there is a terminal"
    add_switch("-d", "--debug", help=text)
    add_switch("--no-test", help=argparse.SUPPRESS)
    add("-p", "--project", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override configs")
    return parser, spellings


def _split_arguments(
    arguments: Sequence[str], spellings: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Separate our own arguments, with all values explicit, from options of Lightning's Trainer."""
    our_arguments: list[str] = []
    trainer_options: dict[str, str] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-") or NEGATIVE_NUMBER.fullmatch(argument):
            our_arguments.append(argument)
            continue
        option = _find_option(name, spellings)
        if not option and name[:2] in spellings:  # `-s5`: the value follows the letter
            option, equals, value = spellings[name[:2]], "=", argument[2:]
        if option and option not in IMPLICIT_VALUES:
            our_arguments.append(argument)
            continue
        if not equals:
            has_value = bool(pending) and _may_be_value(option, pending[0])
            value = pending.pop(0) if has_value else IMPLICIT_VALUES.get(option, "true")
        if option:
            our_arguments.append(f"{option}={value}")
        else:
            trainer_options[name.lstrip("-")] = value
    return our_arguments, trainer_options


def _find_option(name: str, spellings: dict[str, str]) -> str:
    """Return the long name of an option of ours, or of its abbreviation; "" if it is not ours."""
    if name in spellings:
        return spellings[name]
    matches = {spellings[s] for s in spellings if s.startswith(name) and name[:2] == "--"}
    return matches.pop() if len(matches) == 1 else ""


def _may_be_value(option: str, argument: str) -> bool:
    """Return whether the argument after an option with an optional value is that value."""
    if option in SWITCHES:
        return argument.lower() in TRUE_WORDS + FALSE_WORDS
    if argument.startswith("-"):
        return NEGATIVE_NUMBER.fullmatch(argument) is not None
    return "=" not in argument or Path(argument).exists()


def _check_trainer_options(trainer_options: dict[str, str], spellings: dict[str, str]) -> None:
    """Raise ValueError for an option that neither Lightning's Trainer nor our config has."""
    from ldm.train.config import lightning, schema
    from ldm.train.config.renamed_keys import RENAMED_TRAINER_KEYS

    known = [*schema.list_keys(schema.TrainerOptions), *lightning.KNOWN_KEYS["trainer"]]
    for name in trainer_options:
        if name not in known and name not in RENAMED_TRAINER_KEYS:
            if name in FOREIGN_OPTIONS:
                value = f"{FOREIGN_OPTIONS[name]}={trainer_options[name]}"
                raise ValueError(f"command line: unknown option `{name}`, use {value}")
            options = [*known, *(s[2:] for s in spellings if s.startswith("--"))]
            matches = [f"--{option}" for option in sorted(options) if option.startswith(name)]
            if len(matches) > 1:
                raise ValueError(f"command line: `--{name}` could be any of {', '.join(matches)}")
            raise make_unknown_name_error("option", name, options, "command line")


def _parse_bool(text: str) -> bool:
    """Parse yes, true, t, y, 1 or their opposites, as in the original."""
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"`{text}` is neither true nor false")
    return text.lower() in TRUE_WORDS


def _parse_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"`{text}` should be a whole number >= 0")
    return int(text)


if __name__ == "__main__":  # as torchrun starts it
    sys.exit(main())
