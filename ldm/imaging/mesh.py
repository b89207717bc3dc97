"""Save an image with depth as a textured 3D mesh, a .glb file for viewers of 3D models.

The mesh (users see "relief") is a height field with two triangles in each cell. Depth is relative,
so its scale is arbitrary: the nearest point is RELIEF_HEIGHT above the farthest.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import disk_errors_about

__all__ = ["can_save_meshes", "check_can_save_meshes", "save_mesh"]

RELIEF_HEIGHT = 0.35  # as a fraction of the image's longer side
MAX_VERTICES = 256  # along the longer side of the mesh: at most 130,050 triangles


def check_can_save_meshes() -> None:
    """Raise ArgumentError unless the package that writes .glb files is installed."""
    if not can_save_meshes():
        raise ArgumentError("a relief needs the package trimesh: pip install trimesh", "glb")


def can_save_meshes() -> bool:
    """Return whether the package that writes .glb files is installed."""
    return find_spec("trimesh") is not None


def save_mesh(path: str | Path, image: Image.Image, depth: Image.Image) -> int:
    """Write an image with depth as a .glb file; return the number of triangles.

    Args:
        depth: "I;16", larger is nearer; may have another size than the image.
    """
    import trimesh

    scale = min(1.0, MAX_VERTICES / max(depth.size))
    columns, rows = (max(round(side * scale), 2) for side in depth.size)
    heights = Image.fromarray(np.asarray(depth, np.float32) / 65535)
    z = np.asarray(heights.resize((columns, rows), Image.Resampling.BOX))
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    width, height = (side / max(image.size) for side in image.size)
    vertices = np.stack([(u - 0.5) * width, (0.5 - v) * height, z * RELIEF_HEIGHT], axis=-1)
    indices = np.arange(rows * columns).reshape(rows, columns)
    # The corners of each cell: a b above c d.
    a, b, c, d = indices[:-1, :-1], indices[:-1, 1:], indices[1:, :-1], indices[1:, 1:]
    triangles = np.stack([np.stack([a, c, b], -1), np.stack([b, c, d], -1)]).reshape(-1, 3)
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=image.convert("RGB"), metallicFactor=0.0, roughnessFactor=1.0
    )
    texture = trimesh.visual.TextureVisuals(np.stack([u, 1 - v], -1).reshape(-1, 2), material)
    mesh = trimesh.Trimesh(vertices.reshape(-1, 3), triangles, visual=texture, process=False)
    with disk_errors_about(path):
        Path(path).write_bytes(trimesh.exchange.gltf.export_glb(trimesh.Scene(mesh)))
    return len(triangles)
