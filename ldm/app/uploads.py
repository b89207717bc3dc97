"""Images that users bring, kept by content, so that what was made of them can be made again."""

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.runtime.errors import MissingFile
from ldm.runtime.files import replace_when_written

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Uploads"]


class Uploads:
    """A folder of images, named by their SHA-256.

    Args:
        folder: created if absent.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: str | Path) -> str:
        """Keep a copy of a file; returns the path of the copy.

        Raises:
            ValueError: saying what is wrong with a file that is not a whole image.
        """
        from ldm.imaging.reading import load_image

        try:
            load_image(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), Path(path).name)) from error
        return self._store(Path(path).read_bytes())

    def add_image(self, image: "Image.Image") -> str:
        """Keep an image that is not in a file yet; returns its path."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._store(buffer.getvalue())

    def find(self, sha256: object) -> Path:
        """The kept file of this content.

        Raises:
            MissingFile: nobody brought it.
        """
        names = {path.stem: path for path in self.folder.glob("*.png")}
        if sha256 not in names:
            raise MissingFile("made from an image that was not uploaded here: upload it")
        return names[str(sha256)]

    def _store(self, content: bytes) -> str:
        # The suffix is for programs that go by names; our reader looks into the file.
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.png"
        if not path.is_file():
            with replace_when_written(path) as part:
                part.write_bytes(content)
        return str(path)
