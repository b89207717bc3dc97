"""What a command line asks of training, as one value."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainRequest"]


@dataclass(frozen=True)
class TrainRequest:
    """A request to train, check, validate or export.

    Args:
        configs: YAML files, later ones over earlier.
        overrides: `key.sub=value`, over all files.
        train: whether to train.
        validate: whether to print the losses on held-out data.
        dry_run: whether to print the whole config and the memory that it needs, and end.
        name: of the run.
        resume: a run to resume, or one of its states; "": the newest run of this name; None: none.
        logdir: folder of runs.
        processes: to start on this machine; 0: one for each GPU of the config.
        threads: of the CPU, for each process; None: torch's default.
        allow_commands: whether shards may come from `pipe:COMMAND`.
        debug: whether to show tracebacks, and open pdb on a terminal.
        argv: the arguments of the command line, for other processes of the run.
    """

    configs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    train: bool = False
    validate: bool = False
    dry_run: bool = False
    name: str = ""
    resume: str | None = None
    logdir: Path = Path("logs")
    processes: int = 0
    threads: int | None = None
    allow_commands: bool = False
    debug: bool = False
    argv: tuple[str, ...] = ()
