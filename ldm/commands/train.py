"""Train a model: the command line of `ldm.train.command`."""

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    from ldm.train import command

    return command.main(argv, prog or "ldm train")
