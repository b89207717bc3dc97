"""Latent diffusion models in PyTorch: load them, make images, train.

The public names are imported on first use, so that `import ldm` does not import torch:

    model = ldm.load("v2-inference-v.yaml", "v2-1_768-ema-pruned.ckpt", device="cuda")
    image = ldm.txt2img(model, ["a red apple"], size=(768, 768))     # (1, 3, 768, 768) in [-1, 1]

    model = ldm.load(ckpt="sd_xl_base_1.0.safetensors", device="cuda")
    refiner = ldm.load(ckpt="sd_xl_refiner_1.0.safetensors", device="cuda")
    image = ldm.txt2img(model, ["a red apple"], refiner=refiner)     # (1, 3, 1024, 1024)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldm.compat.finder import import_submodule, install_finder
from ldm.runtime.version import __version__

if TYPE_CHECKING:
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.loading.addons.lora import set_loras
    from ldm.loading.config import instantiate
    from ldm.loading.load import load
    from ldm.loading.tiny_autoencoder import load_preview
    from ldm.pipelines import (
        Upscaling,
        class2img,
        depth2img,
        img2img,
        inpaint,
        knn2img,
        layout2img,
        sample,
        semantic2img,
        super_resolve,
        txt2img,
        unclip,
        uncond2img,
        upscale,
        upscale_latent,
        upscale_rgbd,
        vary,
    )

__all__ = [
    "SAMPLERS", "Upscaling", "__version__", "class2img", "depth2img", "img2img", "inpaint",
    "instantiate", "knn2img", "layout2img", "load", "load_preview", "sample", "semantic2img",
    "set_loras", "super_resolve", "txt2img", "unclip", "uncond2img", "upscale", "upscale_latent",
    "upscale_rgbd", "vary",
]  # fmt: skip

install_finder()  # of the original's module names; imports none of them

# Names of __all__ that are not in `ldm.pipelines`.
_MODULES = {
    "SAMPLERS": "ldm.diffusion.samplers",
    "instantiate": "ldm.loading.config",
    "load": "ldm.loading.load",
    "load_preview": "ldm.loading.tiny_autoencoder",
    "set_loras": "ldm.loading.addons.lora",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        return import_submodule("ldm", name)
    return getattr(import_module(_MODULES.get(name, "ldm.pipelines")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
