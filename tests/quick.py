"""Sweeps of which the default run takes the cases that differ most."""

from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """All cases; without `-m slow` the quick ones alone."""
    return [c if c in quick else pytest.param(c, marks=pytest.mark.slow) for c in cases]
