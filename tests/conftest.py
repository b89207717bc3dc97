"""Set before torch is imported: spinning OpenMP threads make tiny models 50 times slower."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What this machine has downloaded is not looked at; see `ldm.loading.published`.
for name in ("HF_HUB_CACHE", "LDM_CACHE"):
    os.environ[name] = str(Path(tempfile.gettempdir(), "ldm-tests-without-a-cache"))
sys.path.insert(0, str(Path(__file__).parent))

from windows import windows  # noqa: E402, F401


@pytest.fixture(autouse=True)
def reset_logging() -> Iterator[None]:
    """Undo what a command run in this process set: the next test may expect a message."""
    yield
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "ldm":
            logging.getLogger(name).setLevel(logging.NOTSET)
            logging.getLogger(name).handlers = []
