"""Finds the modules of `names.MODULES`, and what vendored `ldm` folders have besides.

A vendored folder is one called `ldm` on `sys.path` that is not this package. Python prefers a
package with `__init__.py` to folders without, so this one would hide all of their files: those that
it has no module for are found here. Where both have one, ours is taken; with the environment
variable LDM_VENDORED=1 theirs, if the original has a package of that name.
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

ON_DISK = ("ldm.models.diffusion.ddpm",)  # for web UIs, which look for the file
OURS = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


class OldNames:
    """Finder and loader of old names. Such a name and its file are one module object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec of ours for an old name; None leaves the name to the other finders."""
        if not fullname.startswith("ldm."):
            return None
        parent, _, name = fullname.rpartition(".")
        vendored = _vendored_folders(parent, tuple(sys.path))
        if isinstance(path, list):  # of the parent package: the other finders search it, too
            path += [folder for folder in vendored if folder not in path]
        theirs = PathFinder.find_spec(fullname, vendored) if vendored else None
        if theirs is not None and theirs.loader is not None:  # a file, not a mere folder
            is_preferred = os.environ.get("LDM_VENDORED") == "1" and (
                fullname in MODULES or fullname.startswith(VENDORED_PACKAGES)
            )
            if is_preferred or (fullname in PACKAGES and fullname not in MODULES):
                if theirs.submodule_search_locations is not None:
                    theirs.submodule_search_locations.append(_own_folder(fullname))
                return theirs
        if fullname not in MODULES and fullname not in PACKAGES:
            if fullname in MISSING_MODULES and PathFinder.find_spec(fullname, path) is None:
                message = f"no module named `{fullname}`: {MISSING_MODULES[fullname]}"
                raise ModuleNotFoundError(message, name=fullname)
            return None
        spec = ModuleSpec(fullname, self, is_package=fullname in PACKAGES)  # type: ignore[arg-type]
        if spec.submodule_search_locations is not None:
            folders = [os.path.join(folder, name) for folder in path or ()]
            spec.submodule_search_locations += filter(os.path.isdir, folders)
        return spec

    def invalidate_caches(self) -> None:
        """Look for folders again, such as a repository that was cloned meanwhile."""
        _vendored_folders.cache_clear()

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Import the file behind an old name; None makes an empty package."""
        if spec.name not in MODULES:
            return None
        _warn_of_foreign_files()
        module = import_module(f"ldm.compat.{MODULES[spec.name]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the file its own spec back, which the import system has replaced."""
        spec = module.__spec__
        if spec is not None and spec.loader_state is not None:
            module.__spec__ = spec.loader_state


def install() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldNames())


@functools.cache
def _warn_of_foreign_files() -> None:
    """Warn of another distribution's files among ours: pip lets one overwrite the other's."""
    files = [_own_folder(name) + ".py" for name in ("ldm", *MODULES) if name not in ON_DISK]
    foreign = [file for file in files if os.path.isfile(file)]
    if not foreign:
        return
    from importlib.metadata import distributions

    owners = {
        str(other.metadata["Name"])
        for other in distributions()
        if any(file.parts[0] in ("ldm", "ldm.py") for file in other.files or ())
    }
    names = ", ".join(f"`{name}`" for name in sorted(owners - {DISTRIBUTION})) or "another package"
    warnings.warn(
        f"`{foreign[0]}` belongs to {names}, not to `{DISTRIBUTION}`, which takes its place: "
        f"uninstall both, then install `{DISTRIBUTION}` alone",
        RuntimeWarning,
        stacklevel=2,
    )


def _own_folder(package: str) -> str:
    return os.path.join(OURS, *package.split(".")[1:])


@functools.lru_cache(maxsize=64)
def _vendored_folders(package: str, search_path: tuple[str, ...]) -> list[str]:
    """List the folders of a package in the vendored copies on a search path."""
    texts = [folder for folder in search_path if isinstance(folder, str)]
    roots = [folder for folder in texts if os.path.isdir(os.path.join(folder, "ldm"))]
    copies = {root for root in roots if os.path.isfile(os.path.join(root, "ldm/compat/finder.py"))}
    folders = [
        os.path.join(os.path.abspath(root), *package.split("."))
        for root in roots
        if root not in copies  # this package itself, and others of its version or another
    ]
    return [folder for folder in folders if os.path.isdir(folder)]
