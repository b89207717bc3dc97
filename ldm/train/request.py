"""The parsed command line of training, as one value."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainRequest"]


@dataclass(frozen=True)
class TrainRequest:
    """A request to train, check, validate or export.

    Args:
        configs: YAML files or diffusers folders; later ones override earlier ones.
        overrides: `key.sub=value`, which override all files.
        validate: Whether to print the losses on held-out data.
        dry_run: Whether only to print the whole config and an estimate of its memory.
        resume: A run or one of its states; "" = the newest run of this name; None = a new run.
        processes: Number of processes to start on this machine; 0 = one for each GPU of the config.
        threads: CPU threads of each process; None = torch's default.
        allow_commands: Whether to run `pipe:COMMAND` URLs of shards.
        debug: Whether to show tracebacks, and open pdb on a terminal.
        argv: Command-line arguments, for other processes of the run.
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
