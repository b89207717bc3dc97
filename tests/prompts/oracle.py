"""Modules of compel without its package, which imports all of diffusers."""

import importlib.util
import sys
import types
import warnings


def import_compel_module(name: str) -> types.ModuleType:
    """Import a module of compel."""
    if "compel" not in sys.modules:
        spec = importlib.util.find_spec("compel")
        package = types.ModuleType("compel")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec  # diffusers reads it
        sys.modules["compel"] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"compel.{name}")
