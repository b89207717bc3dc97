"""Parametrised tests of which the default run takes only the cases that differ most."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Mark all cases slow except those of `quick`."""
    return [c if c in quick else pytest.param(c, marks=pytest.mark.slow) for c in cases]
