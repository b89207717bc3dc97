"""Warnings that point at the code that calls this package."""

import sys
import warnings

__all__ = ["warn_caller"]

# torch and contextlib too, as they call functions that have their decorators.
INNER_PACKAGES = ("ldm", "torch", "contextlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line that called this package, however deep the stack is."""
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in INNER_PACKAGES:
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, category, stacklevel=stacklevel)
