"""A1111's web UI looks for this file before it imports anything; imports give `ldm.compat.ddpm`."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("ldm.compat.ddpm")
