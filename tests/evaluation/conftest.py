"""The fixtures of tiny models, shared by the tests of programs."""

from tinymodels import *  # noqa: F403
