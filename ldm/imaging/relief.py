"""A relief of an image and its depth, as a .glb file that viewers of 3D models turn.

The image is the texture of a height field with two triangles between neighbouring points. Depth is
relative, so that the height has no unit: the nearest point is 0.35 of the longer side above the
farthest.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.runtime.errors import ArgumentError

__all__ = ["can_save_reliefs", "check_trimesh", "save_relief"]

HEIGHT = 0.35  # of the longer side, which is 1
POINTS = 256  # along the longer side


def check_trimesh() -> None:
    """Raise ArgumentError unless the package that writes .glb files is installed."""
    if not can_save_reliefs():
        raise ArgumentError("a relief needs the package trimesh: pip install trimesh", "glb")


def can_save_reliefs() -> bool:
    """Return whether the package that writes .glb files is installed."""
    return find_spec("trimesh") is not None


def save_relief(path: str | Path, image: Image.Image, depth: Image.Image) -> int:
    """Write the relief; return its number of triangles.

    Args:
        depth: "I;16", larger is nearer.
    """
    import trimesh

    scale = min(1.0, POINTS / max(depth.size))
    columns, rows = (max(round(side * scale), 2) for side in depth.size)
    heights = Image.fromarray(np.asarray(depth, np.float32) / 65535)
    z = np.asarray(heights.resize((columns, rows), Image.Resampling.BOX))
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    width, height = (side / max(image.size) for side in image.size)
    points = np.stack([(u - 0.5) * width, (0.5 - v) * height, z * HEIGHT], axis=-1)
    corners = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = corners[:-1, :-1], corners[:-1, 1:], corners[1:, :-1], corners[1:, 1:]
    triangles = np.stack([np.stack([a, c, b], -1), np.stack([b, c, d], -1)]).reshape(-1, 3)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=image.convert("RGB"), metallicFactor=0.0, roughnessFactor=1.0
    )
    texture = trimesh.visual.TextureVisuals(np.stack([u, 1 - v], -1).reshape(-1, 2), material)
    mesh = trimesh.Trimesh(points.reshape(-1, 3), triangles, visual=texture, process=False)
    Path(path).write_bytes(trimesh.exchange.gltf.export_glb(trimesh.Scene(mesh)))
    return len(triangles)
