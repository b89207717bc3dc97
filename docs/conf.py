"""Sphinx settings: Markdown pages, and the Python API from its docstrings."""

import subprocess
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

import ldm

ROOT = Path(__file__).resolve().parent.parent
RUN_MAIN = "import sys; from ldm.commands.main import main; main(sys.argv[1:])"

project = "ldm"
author = "the authors of ldm-revived"
version = release = ldm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ldm {version}"
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# References are checked without a network: types of other projects are listed, not linked.
intersphinx_mapping: dict[str, tuple[str, str | None]] = {}
nitpick_ignore_regex = [
    (
        "py:.*",
        r"Tensor|(torch|collections|typing|typing_extensions|pathlib|numpy|PIL|omegaconf)\..*",
    )
]


class CommandHelp(Directive):
    """The help text of `ldm COMMAND`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Run the command with --help."""
        command = [sys.executable, "-c", RUN_MAIN, self.arguments[0], "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        return [nodes.literal_block(text, text, language="text")]


def setup(app) -> None:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
