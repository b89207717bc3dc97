"""Module names of the original code base, and the files of `ldm.compat` that stand behind them."""

MODULES = {
    "ldm.util": "util",
    "ldm.lr_scheduler": "lr_scheduler",
    "ldm.data.base": "data_base",
    "ldm.data.util": "data_util",
    "ldm.modules.diffusionmodules.upscaling": "upscaling",
    "ldm.modules.encoders.modules": "encoders",
    "ldm.modules.midas": "midas",
    "ldm.modules.midas.api": "midas",
    "ldm.modules.ema": "ema",
    "ldm.modules.distributions.distributions": "distributions",
}

# Parents of those names, which are packages even where a file stands behind them.
PACKAGES = {
    name[:end] for name in MODULES for end, sign in enumerate(name) if sign == "." and end > 3
}
