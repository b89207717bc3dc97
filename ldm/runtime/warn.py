"""Warnings that point at the program that calls this package."""

import sys
import warnings

__all__ = ["warn_caller"]

# torch and contextlib, as functions with their decorators are called by them.
INNER_PACKAGES = ("ldm", "torch", "contextlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line that called this package, however deep the call is."""
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in INNER_PACKAGES:
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, category, stacklevel=stacklevel)
