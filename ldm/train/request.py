"""What a command line asks of training, as one value."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainRequest"]


@dataclass(frozen=True)
class TrainRequest:
    """A request to train, check, validate or export."""

    configs: tuple[str, ...] = ()  # YAML files, later ones over earlier
    overrides: tuple[str, ...] = ()  # `key.sub=value`, over all files
    train: bool = False
    validate: bool = False  # whether to print the losses on held-out data
    dry_run: bool = False  # whether to print the whole config and the memory that it needs, and end
    name: str = ""
    resume: str | None = None  # a run or one of its states; "": the newest run of this name
    logdir: Path = Path("logs")  # folder of runs
    processes: int = 0  # to start on this machine; 0: one for each GPU of the config
    threads: int | None = None  # of the CPU, for each process; None: torch's default
    allow_commands: bool = False  # whether shards may come from `pipe:COMMAND`
    debug: bool = False  # whether to show tracebacks, and open pdb on a terminal
    argv: tuple[str, ...] = ()  # the arguments of the command line, for other processes of the run
