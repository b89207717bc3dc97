"""Old module names, and vendored `ldm` folders beside this package."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = [
    "pytorch_lightning", "lightning", "transformers", "kornia", "taming", "clip", "cv2", "xformers",
]  # fmt: skip
IMPORT_ALL = f"""
import importlib, sys
for name in {BLOCKED}:
    sys.modules[name] = None
from ldm.compat.names import MODULES
for name, file in MODULES.items():
    assert importlib.import_module(name) is importlib.import_module("ldm.compat." + file), name
"""


def run(code, **environment):
    """Run a new Python that finds the repository first, and return what it prints."""
    env = {"PYTHONPATH": str(ROOT), "PATH": "", **environment}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_every_old_module_is_imported_without_optional_packages():
    run(IMPORT_ALL)


def test_an_old_module_is_the_file_itself_with_its_own_name():
    import ldm.util

    file = importlib.import_module("ldm.compat.util")
    assert ldm.util is file
    assert file.__name__ == file.__spec__.name == "ldm.compat.util"
    file.print = print
    assert "print" in vars(importlib.import_module("ldm.util"))
    del file.print


def test_unknown_names_stay_unknown():
    for name in ("ldm.utils", "ldm.modules.nothing", "ldm.models.nothing.at_all"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


@pytest.fixture
def vendored(tmp_path):
    """A folder with a namespace package `ldm`."""
    for name in (
        "ldm/util.py", "ldm/data/extra.py", "ldm/modules/extra.py", "ldm/thirdp/deep/extra.py",
        "ldm/modules/distributions/distributions.py", "ldm/modules/distributions/__init__.py",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return str(tmp_path)


PRINT_OWNERS = """
import sys
from importlib.util import find_spec
for name in sys.argv[1:]:
    print("theirs" if (find_spec(name).origin or "").startswith({folder!r}) else "ours")
"""
NAMES = [
    "ldm.util", "ldm.modules.distributions.distributions", "ldm.modules.ema", "ldm.data.folder",
    "ldm.data.extra", "ldm.modules.extra", "ldm.thirdp.deep.extra",
]  # fmt: skip


@pytest.mark.parametrize("order", ["theirs first", "ours first", "added later"])
@pytest.mark.parametrize("variable", ["", "1"])
def test_a_vendored_folder_adds_its_own_modules(vendored, order, variable):
    path = [vendored, str(ROOT)] if order == "theirs first" else [str(ROOT), vendored]
    code = f"import sys; sys.argv[1:] = {NAMES};" + PRINT_OWNERS.format(folder=vendored)
    if order == "added later":
        code = f"import ldm, ldm.data; import sys; sys.path.append({vendored!r});" + code
        path = [str(ROOT)]
    owners = run(code, PYTHONPATH=":".join(path), LDM_VENDORED=variable)
    preferred = "theirs" if variable else "ours"
    assert owners == [preferred, preferred, "ours", "ours", "theirs", "theirs", "theirs"]
