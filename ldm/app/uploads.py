"""Store uploaded images by hash, so that results can be reproduced from them."""

import hashlib
import io
from pathlib import Path

from PIL import Image

from ldm.imaging.reading import load_image
from ldm.runtime.errors import MissingFile
from ldm.runtime.files import write_atomically

__all__ = ["Uploads"]


class Uploads:
    """A folder of images named by their SHA-256; created if absent."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: str | Path) -> str:
        """Store a copy of an image file; return its path.

        Raises:
            ValueError: The file is damaged or not an image.
        """
        try:
            load_image(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), Path(path).name)) from error
        return self._store(Path(path).read_bytes())

    def add_image(self, image: Image.Image) -> str:
        """Store an image as PNG; return its path."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._store(buffer.getvalue())

    def find(self, sha256: object) -> Path:
        """Find the stored file with this hash.

        Raises:
            MissingFile: It was not uploaded.
        """
        # Never used as a path, as it may come from an untrusted image.
        paths = {path.stem: path for path in self.folder.glob("*.png")}
        if sha256 not in paths:
            raise MissingFile("made from an image that was not uploaded here: upload it")
        return paths[str(sha256)]

    def _store(self, content: bytes) -> str:
        # The content may be of any format, as our reader ignores the suffix.
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.png"
        if not path.is_file():
            with write_atomically(path) as partial:
                partial.write_bytes(content)
        return str(path)
