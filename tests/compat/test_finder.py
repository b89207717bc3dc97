"""The original's module names, and vendored `ldm` folders beside this package."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL_PACKAGES = [
    "pytorch_lightning", "lightning", "transformers", "kornia", "taming", "clip", "cv2", "xformers",
]  # fmt: skip
IMPORT_ALL = f"""
import importlib, sys
for name in {OPTIONAL_PACKAGES}:
    sys.modules[name] = None
from ldm.compat.names import MODULES
for name, file in MODULES.items():
    assert importlib.import_module(name) is importlib.import_module("ldm.compat." + file), name
"""


def run(code, cwd=None, **environment):
    """Run code in a new process with the repository in its path; return the words it prints."""
    env = {"PYTHONPATH": str(ROOT), "PATH": "", **environment}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_every_module_of_the_original_is_imported_without_optional_packages():
    run(IMPORT_ALL)


def test_a_module_of_the_original_is_the_module_of_compat_itself():
    import ldm.util

    module = importlib.import_module("ldm.compat.util")
    assert ldm.util is module
    assert module.__name__ == module.__spec__.name == "ldm.compat.util"
    module.print = print
    assert "print" in vars(importlib.import_module("ldm.util"))
    del module.print


def test_modules_that_the_original_imports_are_attributes_of_their_packages():
    run("""
import ldm.models.diffusion.ddpm
ldm.util, ldm.modules.ema, ldm.models.diffusion.dpm_solver.sampler
for package in (ldm, ldm.modules):
    assert not hasattr(package, "nothing")
""")


def test_unknown_module_names_are_not_found():
    for name in ("ldm.utils", "ldm.modules.nothing", "ldm.models.nothing.at_all"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


@pytest.fixture
def vendored(tmp_path):
    """Path of a folder with a namespace package `ldm`."""
    for name in (
        "ldm/util.py", "ldm/data/extra.py", "ldm/modules/extra.py", "ldm/thirdp/deep/extra.py",
        "ldm/modules/distributions/distributions.py", "ldm/modules/distributions/__init__.py",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return str(tmp_path)


def find_owners(modules, vendored, before="", after="", **environment):
    """Return whether a new process finds each module "vendored" or "ours"; run code around that."""
    code = f"""
import sys
{before}
from importlib.util import find_spec
for spec in map(find_spec, {modules}):
    print("vendored" if (spec.origin or "").startswith({vendored!r}) else "ours")
{after}"""
    return run(code, **environment)


MODULES = [
    "ldm.util", "ldm.modules.distributions.distributions", "ldm.modules.ema", "ldm.data.folder",
    "ldm.data.extra", "ldm.modules.extra", "ldm.thirdp.deep.extra",
]  # fmt: skip


@pytest.mark.parametrize("order", ["vendored first", "ours first", "added later"])
@pytest.mark.parametrize("variable", ["", "1"])
def test_a_vendored_folder_adds_its_own_modules(vendored, order, variable):
    before, path = "", f"{vendored}:{ROOT}" if order == "vendored first" else f"{ROOT}:{vendored}"
    if order == "added later":
        before, path = f"import ldm, ldm.data; sys.path.append({vendored!r})", str(ROOT)
    owners = find_owners(MODULES, vendored, before, PYTHONPATH=path, LDM_VENDORED=variable)
    preferred = "vendored" if variable else "ours"
    assert owners == [preferred, preferred, "ours", "ours", "vendored", "vendored", "vendored"]


def test_a_vendored_package_runs_its_own_init(vendored):
    """Our packages under the original's names are empty."""
    init = Path(vendored, "ldm/modules/distributions/__init__.py")
    init.write_text("from ldm.modules.distributions import extra", "utf-8")
    (init.parent / "extra.py").write_text("value = 3", "utf-8")
    names = ["ldm.modules.distributions.distributions", "ldm.modules.distributions.extra"]
    after = "print(sys.modules['ldm.modules.distributions'].extra.value)"
    output = find_owners(names, vendored, after=after, PYTHONPATH=f"{ROOT}:{vendored}")
    assert output == ["ours", "vendored", "3"]


def test_a_fork_replaces_only_its_files_of_ldm_data(vendored):
    for name in ("ldm/data/__init__.py", "ldm/data/folder.py", "ldm/model.py"):
        Path(vendored, name).touch()
    names = ["ldm.data.folder", "ldm.data.hub", "ldm.model"]
    environment = {"PYTHONPATH": f"{vendored}:{ROOT}", "LDM_VENDORED": "1"}
    assert find_owners(names, vendored, **environment) == ["vendored", "ours", "ours"]


def test_an_import_of_an_unsupported_name_suggests_an_alternative(vendored):
    for name, alternative in (("losses.vqperceptual", "losses of VQ"), ("x_transformer", "BERT")):
        with pytest.raises(ModuleNotFoundError, match=alternative):
            importlib.import_module(f"ldm.modules.{name}")
    with pytest.raises(ImportError, match="transformers.T5EncoderModel"):
        from ldm.modules.encoders.modules import FrozenT5Embedder  # noqa: F401
    Path(vendored, "ldm/modules/x_transformer.py").touch()
    run("import ldm.modules.x_transformer", PYTHONPATH=f"{ROOT}:{vendored}")


def test_a_dotted_name_of_a_class_is_not_a_module():
    """Web UIs find what to replace by importing shorter and shorter prefixes."""
    for name in ("ldm.util.default", "ldm.modules.midas.api.MiDaSInference"):
        with pytest.raises(ImportError):
            importlib.import_module(name)


def test_a_distribution_that_overwrites_our_files_is_named(tmp_path):
    """Several distributions install a package `ldm`, into the same folder as ours."""
    ignore = shutil.ignore_patterns("__pycache__", "app", "generate", "train", "*.csv")
    shutil.copytree(ROOT / "ldm", tmp_path / "ldm", ignore=ignore)
    (tmp_path / "ldm" / "util.py").touch()
    other = tmp_path / "stable_diffusion_sdkit-2.1.5.dist-info"
    other.mkdir()
    metadata = "Metadata-Version: 2.1\nName: stable-diffusion-sdkit\n"
    (other / "METADATA").write_text(metadata, "utf-8")
    (other / "RECORD").write_text("ldm/util.py,,\n", "utf-8")
    code = """
import warnings
warnings.simplefilter("error", RuntimeWarning)
try:
    import ldm.util
except RuntimeWarning as warning:
    print(warning)
"""
    message = " ".join(run(code, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert "`stable-diffusion-sdkit`, not to `ldm-revived`" in message


def test_a_class_of_compat_in_a_pickle_is_refused(tmp_path):
    """The class is refused although its module is imported."""
    import torch

    import ldm.util
    from ldm.loading.files.checkpoint import read_checkpoint
    from ldm.runtime.errors import FileFormatError

    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "code": ldm.util.default}, path)
    with pytest.raises(FileFormatError, match=r"ldm\.compat\.util\.default"):
        read_checkpoint(path)
