"""Module names of the original code base, and the files of `ldm.compat` that stand behind them."""

MODULES = {
    "ldm.util": "util",
    "ldm.modules.ema": "ema",
    "ldm.modules.distributions.distributions": "distributions",
}

# Parents of those names, which are packages even where a file stands behind them.
PACKAGES = {
    name[:end] for name in MODULES for end, sign in enumerate(name) if sign == "." and end > 3
}
