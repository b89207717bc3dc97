"""Writes tiny SDXL models with random weights: base, refiner and inpainting, and their YAMLs.

    python tests/make_tiny_sdxl.py FOLDER

Weights have the original's names; files have the config as metadata.
"""

import sys
from pathlib import Path

from ldm.loading.config import format_yaml
from loading import tinyfamilies

FILES = {
    "xl": "sd_xl_base_1.0",
    "xl-refiner": "sd_xl_refiner_1.0",
    "xl-inpainting": "sd_xl_base_1.0_inpainting_0.1",
}


def make_tiny_sdxl(folder: Path) -> dict[str, Path]:
    """Write the models; return their paths by family."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {family: folder / f"{name}.safetensors" for family, name in FILES.items()}
    for family, path in paths.items():
        tinyfamilies.write_family(family, path)
        path.with_suffix(".yaml").write_text(format_yaml(tinyfamilies.make_small_config(family)))
    return paths


if __name__ == "__main__":
    make_tiny_sdxl(Path(sys.argv[1]))
