"""The command of every task: `ldm txt2img`, `ldm img2img` …"""

from collections.abc import Sequence

from ldm.generate.command_line import build_parser, parse_request
from ldm.generate.tasks import TASKS
from ldm.runtime.command import run_command

__all__ = ["main"]


def main(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line of the task `name`; return the exit status."""
    task = TASKS[name]
    parser = build_parser(task, prog)
    request = parse_request(task, argv, parser)

    def run() -> None:
        from ldm.generate.listener import ConsoleListener
        from ldm.generate.run import run_request

        run_request(request, ConsoleListener(request.output.json))

    return run_command(run, parser)
