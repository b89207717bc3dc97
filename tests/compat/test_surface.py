"""Every name of `surface` exists, with the signature that third-party code expects if given."""

import inspect
from importlib import import_module

import pytest
from surface import TIER_1, TIER_2

from ldm.compat.names import MODULES

SURFACE = {**TIER_1, **TIER_2}


def is_same_default(actual, expected):
    if isinstance(expected, (list, tuple)):
        return list(actual) == list(expected)
    return actual == expected


def assert_signature(function, text, name):
    """Compare names, order and defaults; ours may have more parameters, if they have defaults."""
    namespace = {}
    exec(f"def original({text}): pass", namespace)
    theirs = inspect.signature(namespace["original"]).parameters.values()
    ours = list(inspect.signature(function).parameters.values())
    by_name = {parameter.name: parameter for parameter in ours}
    own_kinds = {parameter.kind for parameter in ours}
    for position, parameter in enumerate(theirs):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            assert parameter.kind in own_kinds, f"{name} takes no {parameter}"
            continue
        assert parameter.name in by_name, f"{name} has no parameter {parameter.name}"
        own = by_name.pop(parameter.name)
        assert is_same_default(own.default, parameter.default), f"{name}: default of {own.name}"
        if parameter.kind != parameter.KEYWORD_ONLY:
            assert ours.index(own) == position, f"{name}: position of {own.name}"
            assert own.kind == own.POSITIONAL_OR_KEYWORD, f"{name}: kind of {own.name}"
    extra = [p for p in by_name.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert all(p.default is not p.empty for p in extra), f"{name} needs {extra}"


@pytest.mark.parametrize("module_name", SURFACE)
def test_every_name_exists_with_its_signature(module_name):
    assert module_name in MODULES
    module = import_module(module_name)
    for line in filter(None, map(str.strip, SURFACE[module_name].splitlines())):
        name, bracket, text = line.partition("(")
        function, owner = module, None
        for attribute in name.split("."):
            function, owner = getattr(function, attribute), function
        if bracket:
            is_method = inspect.isclass(owner) and not isinstance(
                inspect.getattr_static(owner, name.rpartition(".")[2]), (classmethod, staticmethod)
            )
            text = f"self, {text}" if is_method else f"{text}"
            assert_signature(function, text.rpartition(")")[0], f"{module_name}.{name}")
