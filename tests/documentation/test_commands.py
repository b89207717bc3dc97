"""The commands of README and docs run as written: `pytest -m docs`.

Commands are the bash and python blocks, in order; `<!-- not run: WHY -->` before a block skips
it. They run in a copy of the tracked files, where small models with random weights stand for
published ones, and in a virtual environment that also finds the packages of this one.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import time
import urllib.request
import venv
from pathlib import Path

import pytest

from documentation.standins import record_downloads, write_stand_ins

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?:<!-- not run: (.+?) -->\n+)?^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE
)
PAGE = "http://127.0.0.1:7860"


def list_blocks():
    """List the commands of every block, named by file and line."""
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]:
        text = path.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            reason, language, code = block.groups()
            command = ["bash", "-ec", code] if language == "bash" else ["python", "-c", code]
            line = text[: block.start(3)].count("\n") + 1
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            yield pytest.param(command, id=f"{path.name}:{line}", marks=marks)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A copy of the tracked files, with the stand-ins."""
    folder = tmp_path_factory.mktemp("docs") / "ldm"
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listing.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    write_stand_ins(folder)
    record_downloads(folder, folder.parent / "cache")
    return folder


@pytest.fixture(scope="session")
def environment(folder):
    """Variables of a virtual environment with the copy installed, which finds our packages, too."""
    venv.create(folder.parent / "venv", with_pip=True)
    packages = next((folder.parent / "venv").rglob("site-packages"))
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
    programs = [str(folder.parent / "venv/bin"), sysconfig.get_path("scripts"), os.environ["PATH"]]
    variables = {**os.environ, "PATH": os.pathsep.join(programs), "OMP_WAIT_POLICY": "PASSIVE"}
    variables["LDM_CACHE"] = str(folder.parent / "cache")
    variables["PYTHONPATH"] = str(folder)  # for programs of the outer environment, such as torchrun
    install = ["python", "-m", "pip", "install", "--quiet", "-e", "."]
    subprocess.run(install, cwd=folder, env=variables, check=True)
    return variables


@pytest.mark.docs
@pytest.mark.parametrize("command", list(list_blocks()))
def test_a_command_of_the_documentation_runs_as_written(command, folder, environment):
    log = folder.parent / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        status = wait_for_page(process) if "ldm app" in command[-1] else process.wait()
    assert status == 0, "\n".join(log.read_text().splitlines()[-15:])


def wait_for_page(process):
    """Wait up to five minutes for the page and stop its server; return 0 if it answered, else 1."""
    deadline = time.monotonic() + 300
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                return int(urllib.request.urlopen(PAGE, timeout=5).status != 200)
            except OSError:
                time.sleep(1)
        return 1
    finally:
        os.killpg(process.pid, 15)
        process.wait()
