"""Settings of all tests. OpenMP's precede the import of torch: spinning threads are 50x slower."""

import gc
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests must not use downloaded files of this machine; see `ldm.loading.published`.
for name in ("HF_HUB_CACHE", "LDM_CACHE"):
    os.environ[name] = str(Path(tempfile.gettempdir(), "ldm-tests-without-a-cache"))
sys.path.insert(0, str(Path(__file__).parent))
gc.disable()

from windows import windows  # noqa: E402, F401


def pytest_configure(config: pytest.Config) -> None:
    """Import Lightning, which takes 6 s, in slow runs only."""
    if "not slow" in config.option.markexpr:
        sys.modules["pytorch_lightning"] = None


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which took a fifth of collecting tests."""
    gc.enable()
    gc.freeze()


@pytest.fixture(scope="session")
def diffusers() -> ModuleType:
    """The package, imported only for tests that need it, as that takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def reset_logging() -> Iterator[None]:
    """Undo the logging settings of a command, as the next test may expect a message."""
    yield
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.split(".")[0] == "ldm" and isinstance(logger, logging.Logger):
            logger.handlers = []
            if logger.level != logging.NOTSET:  # setting it goes through thousands of loggers
                logger.setLevel(logging.NOTSET)
