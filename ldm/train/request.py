"""The parsed command line of training, as one value."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainRequest"]


@dataclass(frozen=True)
class TrainRequest:
    """A request to train, check, validate or export."""

    configs: tuple[str, ...] = ()  # YAML files; later ones override earlier ones
    overrides: tuple[str, ...] = ()  # `key.sub=value`, which override all files
    train: bool = False
    validate: bool = False  # whether to print the losses on held-out data
    dry_run: bool = False  # whether to print the whole config and its memory instead
    name: str = ""
    resume: str | None = None  # a run or one of its states; "": the newest of this name; None: no
    logdir: Path = Path("logs")  # folder of runs
    processes: int = 0  # number to start on this machine; 0: one for each GPU of the config
    threads: int | None = None  # CPU threads of each process; None: torch's default
    allow_commands: bool = False  # whether to run `pipe:COMMAND` addresses of shards
    debug: bool = False  # whether to show tracebacks, and open pdb on a terminal
    argv: tuple[str, ...] = ()  # command-line arguments, for other processes of the run
