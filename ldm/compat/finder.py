"""Finds the modules of `names.MODULES`, and the other modules of vendored `ldm` folders.

A vendored folder is a folder `ldm` on `sys.path` that is not this package. Python prefers a package
with `__init__.py` to folders without, so this package would hide all files of vendored folders:
modules that it does not have are found here. If both have a module, that of this package is
imported; with the environment variable LDM_VENDORED=1 the vendored one (see VENDORED_PACKAGES).
"""

import functools
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from ldm.compat.names import DISTRIBUTION, MISSING_MODULES, MODULES, PACKAGES, VENDORED_PACKAGES

# Names of the original that are also files of this package, as web UIs look for the file
FILES_ON_DISK = ("ldm.models.diffusion.ddpm",)
PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


class CompatFinder:
    """Finder and loader of the original's module names, as the module objects of `ldm.compat`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a name of the original; None leaves the name to other finders."""
        if not fullname.startswith("ldm."):
            return None
        parent, _, name = fullname.rpartition(".")
        folders = _find_vendored_folders(parent, tuple(sys.path))
        if isinstance(path, list):
            # This is the parent's `__path__`: other finders must search these folders, too.
            path += [folder for folder in folders if folder not in path]
        vendored_spec = PathFinder.find_spec(fullname, folders) if folders else None
        if vendored_spec is not None and vendored_spec.loader is not None:  # not only a folder
            is_preferred = os.environ.get("LDM_VENDORED") == "1" and (
                fullname in MODULES or fullname.startswith(VENDORED_PACKAGES)
            )
            if is_preferred or (fullname in PACKAGES and fullname not in MODULES):
                if vendored_spec.submodule_search_locations is not None:
                    vendored_spec.submodule_search_locations.append(_get_folder(fullname))
                return vendored_spec
        if fullname not in MODULES and fullname not in PACKAGES:
            if fullname in MISSING_MODULES and PathFinder.find_spec(fullname, path) is None:
                message = f"no module named `{fullname}`: {MISSING_MODULES[fullname]}"
                raise ModuleNotFoundError(message, name=fullname)
            return None
        spec = ModuleSpec(fullname, self, is_package=fullname in PACKAGES)  # type: ignore[arg-type]
        if spec.submodule_search_locations is not None:
            subfolders = [os.path.join(folder, name) for folder in path or ()]
            spec.submodule_search_locations += filter(os.path.isdir, subfolders)
        return spec

    def invalidate_caches(self) -> None:
        """Forget the vendored folders: a repository may have been cloned since."""
        _find_vendored_folders.cache_clear()

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Import the module for a name of the original; None creates an empty package."""
        if spec.name not in MODULES:
            return None
        _warn_about_foreign_files()
        module = import_module(f"ldm.compat.{MODULES[spec.name]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has replaced."""
        spec = module.__spec__
        assert spec is not None
        if spec.name in PACKAGES:
            vars(module)["__getattr__"] = functools.partial(import_submodule, spec.name)
        if spec.loader_state is not None:
            module.__spec__ = spec.loader_state


def import_submodule(package: str, name: str) -> ModuleType:
    """Import a module of the original that is read as an attribute of its package.

    The original's modules import each other: after `import ldm.models.diffusion.ddpm`, third-party
    code reads `ldm.util`.
    """
    fullname = f"{package}.{name}"
    if fullname not in MODULES and fullname not in PACKAGES:
        raise AttributeError(f"module `{package}` has no attribute `{name}`")
    return import_module(fullname)


def install_finder() -> None:
    """Make the original's module names importable."""
    if not any(isinstance(finder, CompatFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CompatFinder())


@functools.cache
def _warn_about_foreign_files() -> None:
    """Warn if another distribution has files in this package: it may have overwritten ours."""
    files = [_get_folder(name) + ".py" for name in ("ldm", *MODULES) if name not in FILES_ON_DISK]
    foreign_files = [file for file in files if os.path.isfile(file)]
    if not foreign_files:
        return
    from importlib.metadata import distributions  # slow to import, and rarely needed

    owners = {
        str(distribution.metadata["Name"])
        for distribution in distributions()
        if any(file.parts[0] in ("ldm", "ldm.py") for file in distribution.files or ())
    }
    names = ", ".join(f"`{name}`" for name in sorted(owners - {DISTRIBUTION})) or "another package"
    warnings.warn(
        f"`{foreign_files[0]}` belongs to {names}, not to `{DISTRIBUTION}`, which replaces it: "
        f"uninstall both, then install only `{DISTRIBUTION}`",
        RuntimeWarning,
        stacklevel=2,
    )


def _get_folder(package: str) -> str:
    return os.path.join(PACKAGE_FOLDER, *package.split(".")[1:])


@functools.lru_cache(maxsize=64)
def _find_vendored_folders(package: str, search_path: tuple[str, ...]) -> list[str]:
    """List the folders of a package in the vendored `ldm` folders of a search path."""
    roots = [
        root
        for root in search_path
        if isinstance(root, str)  # Python ignores other entries
        and os.path.isdir(os.path.join(root, "ldm"))
        # neither this package itself nor another copy of it
        and not os.path.isfile(os.path.join(root, "ldm/compat/finder.py"))
    ]
    folders = [os.path.join(os.path.abspath(root), *package.split(".")) for root in roots]
    return [folder for folder in folders if os.path.isdir(folder)]
