"""Training without plots and states, which are slow and tested elsewhere."""

import sys

import pytest


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as if matplotlib were not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train without saving states to resume from."""
    monkeypatch.setattr("ldm.train.loop.save_state", lambda run: None)
