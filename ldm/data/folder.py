"""A folder of images and their captions.

DIR/metadata.jsonl        {"file_name": "images/0001.png", "text": "a red apple", …}
DIR/metadata.json         the same in a list, or {"images/0001.png": "a red apple", …}
DIR/metadata.csv          file_name,text,…            (also with semicolons or tabs)
DIR/train/metadata.jsonl  the same for a subfolder
DIR/0001.png, 0001.txt    without metadata: every image, with the .txt or .caption beside it, or
                          the `text` or `caption` of the .json
DIR/10_sks dog/0001.png   a folder of kohya's scripts: ten repeats per epoch; without a caption
                          file, the caption is the rest of the folder's name
DIR/cat/0001.png          with `class_folders`: class labels are the indices of the sorted folders
"""

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from posixpath import normpath

from ldm.data.dataset import ImageDataset, UnreadableSample
from ldm.data.transforms import Transform, get_captions, get_class_label
from ldm.imaging.reading import IMAGE_SUFFIXES, read_size
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile
from ldm.runtime.files import list_files, read_text
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["ImageFolder", "read_metadata"]

log = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.json", "metadata.csv")  # the first found is read
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
CACHE_BYTES = 2**28  # maximum size of the image files kept in memory


class ImageFolder(ImageDataset):
    """The images of a folder with their metadata.

    Args:
        root: The folder. A row with `repeats` is that many samples.
        transform: See `ImageDataset`.
        split: Keep the rows with this `split`; None = all.
        where: Keep the rows with these values, {"object": "robot"}; None = all.
        fields: Values that override the metadata, {"text": "a photo of a sks dog"}.
        text: Field of the metadata with the caption; rows without it use `caption`.
        metadata: Metadata file, of any name; None = that in the folder, if there is one.
        class_folders: Whether each folder in `root` is a class, whose label `class_label` is the
            index of its name among the sorted names.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        transform: Transform,
        split: str | None = None,
        where: JsonMapping | None = None,
        fields: JsonMapping | None = None,
        text: str = "text",
        metadata: str | Path | None = None,
        class_folders: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, seed)
        self.root = Path(root).expanduser()
        self.metadata_file = None if metadata is None else Path(metadata).expanduser()
        filters = {**(where or {}), **({} if split is None else {"split": split})}
        rows, caption_errors = _read_rows(self.root, self.metadata_file)
        # If `fields` sets the caption, unreadable caption files do not matter.
        self.caption_errors = {} if "text" in (fields or {}) else caption_errors  # by file_name
        if class_folders:
            _set_class_labels(rows, self.root)
        rows = [row for row in rows if all(row.get(key) == v for key, v in filters.items())]
        if text != "text" and not any(text in row for row in rows):
            raise ArgumentError(f"`{root}`: no image has a `{text}`")
        caption_fields = (text if row.get(text) else "caption" for row in rows)
        captioned_rows = (
            {**row, "text": row[field]} if field in row else row
            for row, field in zip(rows, caption_fields, strict=True)
        )
        self.rows = [
            {**row, **(fields or {})}
            for row in captioned_rows
            for _ in range(row.get("repeats", 1))
        ]
        for row in self.rows:
            get_captions(row)  # both raise FileFormatError
            transform.parse_score_and_size(row)
            get_class_label(row)
        if not self.rows:
            reason = ", ".join(f"{key} `{value}`" for key, value in filters.items())
            raise ArgumentError(f"`{root}` has no images" + (f" with {reason}" if reason else ""))
        self._cached_files: dict[str, bytes] = {}  # small datasets are read from disk once
        self._free_cache_bytes = CACHE_BYTES
        self._assign_buckets()

    def __len__(self) -> int:
        return len(self.rows)

    def read_row(self, index: int) -> JsonMapping:
        if reason := self.caption_errors.get(self.get_name(index)):
            raise UnreadableSample(self.get_name(index), reason)
        return self.rows[index]

    def get_name(self, index: int) -> str:
        return str(self.rows[index]["file_name"])

    def read_bytes(self, index: int) -> bytes:
        name = self.get_name(index)
        if name not in self._cached_files:
            data = (self.root / name).read_bytes()
            self._free_cache_bytes -= len(data)
            if self._free_cache_bytes < 0:
                return data
            self._cached_files[name] = data
        return self._cached_files[name]

    def _read_size(self, index: int) -> tuple[int, int]:
        return read_size(self.root / self.get_name(index))


def read_metadata(root: Path, metadata_file: Path | None = None) -> list[JsonObject]:
    """Read one row per image, each with `file_name`, from the metadata file or image files.

    Args:
        metadata_file: See `ImageFolder`.
    Raises:
        MissingFile: There is no folder, or no image in it.
        FileFormatError: The metadata cannot be read, or a row has no `file_name`.
    """
    return _read_rows(root, metadata_file)[0]


def _read_rows(root: Path, metadata_file: Path | None) -> tuple[list[JsonObject], dict[str, str]]:
    """Return the rows, and by `file_name` the reasons why captions cannot be read."""
    if not root.is_dir():
        raise MissingFile(f"there is no folder `{root}`")
    caption_errors: dict[str, str] = {}
    if metadata_file is None:
        files = {path.name.lower(): path for path in root.iterdir() if path.is_file()}
        metadata_file = next((files[name] for name in METADATA_FILES if name in files), None)
    if metadata_file is not None:
        rows = list(_read_metadata_file(metadata_file))
        if not rows:
            raise FileFormatError(f"`{metadata_file}` has no rows")
        images = [path for path in list_files(root) if path.suffix.lower() in IMAGE_SUFFIXES]
        if count := _count_unlisted(images, rows, root):
            message = "`%s`: left out %d images without a row in `%s`"
            log.warning(message, root, count, metadata_file.name)
    else:
        rows = list(_make_rows(root, caption_errors))
        if not rows:
            raise MissingFile(f"`{root}` has no metadata.jsonl, metadata.csv or images")
    for number, row in enumerate(rows, 1):
        try:
            _normalize_row(row, root)
        except (TypeError, ValueError) as error:
            raise FileFormatError(f"`{root}`: row {number} of the metadata {error}") from None
    return rows, caption_errors


def _set_class_labels(rows: list[JsonObject], root: Path) -> None:
    """Set `class_label` of each row to the index of its folder among the sorted ones.

    Raises:
        FileFormatError: An image is not in a folder.
    """
    folders = [Path(row["file_name"]).parts[0] for row in rows if "/" in row["file_name"]]
    if len(folders) < len(rows):
        name = next(row["file_name"] for row in rows if "/" not in row["file_name"])
        raise FileFormatError(f"`{root}`: `{name}` is not in the folder of a class")
    labels = {name: label for label, name in enumerate(sorted(set(folders)))}
    for row, folder in zip(rows, folders, strict=True):
        row["class_label"] = labels[folder]


def _count_unlisted(images: list[Path], rows: list[JsonObject], root: Path) -> int:
    """Count the images that no row of the metadata names."""
    names = {normpath(str(row.get("file_name")).replace("\\", "/")) for row in rows}
    return sum(path.relative_to(root).as_posix() not in names for path in images)


def _normalize_row(row: JsonObject, root: Path) -> None:
    """Convert `file_name` and `repeats` of a row in place; raise ValueError if they are invalid."""
    name, repeats = row.get("file_name"), row.get("repeats") or 0
    if not name or not isinstance(name, str):
        names = ", ".join(f"`{key}`" for key in row if key != "file_name")
        raise ValueError(f"has no `file_name`, only {names}")
    if "\\" in name and not (root / name).exists():  # written on Windows
        row["file_name"] = name.replace("\\", "/")
    if row.get("repeats") in (None, ""):
        row.pop("repeats", None)
    elif str(repeats).strip().removesuffix(".0").isdecimal():
        row["repeats"] = int(float(repeats))
    else:
        raise ValueError(f"has `repeats` {repeats}, which is not a count")


def _read_metadata_file(path: Path) -> Iterator[JsonObject]:
    return _read_csv_rows(path) if path.suffix.lower() == ".csv" else _read_json_rows(path)


def _read_csv_rows(path: Path) -> Iterator[JsonObject]:
    """Read rows delimited by comma, semicolon or tab: spreadsheets differ by locale."""
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    lines = list(StringIO(text))
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    end = reader.line_num
    try:
        for row in reader:
            start, end = end, reader.line_num
            if end > start + 1:
                _check_quotes(path, lines, start, end, delimiter)
            if None in row:
                message = f"more fields than the first line, quote texts with `{delimiter}`"
                raise FileFormatError(f"`{path}`, line {reader.line_num}: {message}")
            yield row
    except csv.Error as error:  # such as a field of 128 KB, after a quote that is not closed
        raise FileFormatError(f"`{path}`, after line {reader.line_num}: {error}") from error


def _check_quotes(path: Path, lines: list[str], start: int, end: int, delimiter: str) -> None:
    """Raise FileFormatError if a row of several lines has an unclosed quote, which joins rows."""
    reader = csv.reader(lines[start:end], delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        list(reader)
    except csv.Error:  # the file ends within quotes, or a text follows the closing quote
        start += next(k for k, line in enumerate(lines[start:end], 1) if line.strip())
        message = "a quote is not closed, or a quote within a text is not doubled"
        raise FileFormatError(f"`{path}`, line {start}: {message}") from None


def _read_json_rows(path: Path) -> Iterator[JsonObject]:
    """Read rows, one per line or in arrays, or {name of an image: caption}."""
    # pandas writes NaN for a missing value.
    text, decoder = read_text(path), json.JSONDecoder(parse_constant=lambda _: None)
    line, position, end = 1, 0, 0
    while match := re.compile(r"\S").search(text, end):
        line, position = line + text.count("\n", position, match.start()), match.start()
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError as error:
            raise FileFormatError(f"`{path}`, line {line}: {error}") from None
        if isinstance(value, dict) and value and all(map(_is_image_name, value)):
            value = [{"file_name": name, "text": caption} for name, caption in value.items()]
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise FileFormatError(f"`{path}`, line {line}: `{row}` is not a row, {{…}}")
            yield row


def _is_image_name(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _make_rows(root: Path, caption_errors: dict[str, str]) -> Iterator[JsonObject]:
    """Make the rows of a folder without metadata, with the caption beside each image.

    Its subfolders may have their own metadata.

    Args:
        caption_errors: Reasons why captions cannot be read are added to it by `file_name`.
    """
    images: list[Path] = []
    metadata_files: dict[Path, Path] = {}  # by folder
    captions: dict[tuple[Path, str], Path] = {}
    skipped: Counter[str] = Counter()
    for path in list_files(root, skipped):
        suffix = path.suffix.lower()
        if path.name.lower() in METADATA_FILES:
            metadata_files.setdefault(path.parent, path)
        elif suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif suffix in CAPTION_SUFFIXES:
            captions[path.with_suffix(""), suffix] = path
        else:
            skipped[suffix or path.name] += 1
    for folder, metadata_file in metadata_files.items():
        rows = list(_read_metadata_file(metadata_file))
        for row in rows:
            if isinstance(row.get("file_name"), str):
                row["file_name"] = f"{folder.relative_to(root).as_posix()}/{row['file_name']}"
        yield from rows
        folder_images = [path for path in images if folder in path.parents]
        count = _count_unlisted(folder_images, rows, root)
        skipped[f"images without a row in `{metadata_file.relative_to(root)}`"] += count
    used_keys = set()  # of captions with an image
    for path in sorted(path for path in images if metadata_files.keys().isdisjoint(path.parents)):
        row = {"file_name": path.relative_to(root).as_posix()}
        kohya_match = re.fullmatch(r"(\d+)_(.+)", path.parent.name) if path.parent != root else None
        if kohya_match:
            row |= {"repeats": int(kohya_match[1]), "text": kohya_match[2]}
        stems = (path.with_suffix(""), path)  # a.txt or a.png.txt
        keys = [(stem, suffix) for suffix in CAPTION_SUFFIXES for stem in stems]
        used_keys.update(keys)
        if caption_files := [captions[key] for key in keys if key in captions]:
            try:
                text = _read_caption(caption_files[0])
                skipped[".json"] += text is None
                row |= {} if text is None else {"text": text}
            except (OSError, ValueError) as error:
                caption_errors[row["file_name"]] = str(error)
            text_files = [file for file in caption_files if file.suffix.lower() != ".json"]
            skipped["captions of images that have another"] += len(text_files[1:])
        yield row
    for _, suffix in captions.keys() - used_keys:
        skipped[suffix if suffix == ".json" else "captions without an image"] += 1
    if summary := ", ".join(f"{n} {kind}" for kind, n in skipped.most_common() if n):
        log.warning("`%s`: left out %s", root, summary)


def _read_caption(path: Path) -> str | list[str] | None:
    """Read the caption in a file; None if it is a .json without one."""
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return text.strip()
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise FileFormatError(f"`{path}`: {error}") from None
    return (fields.get("text") or fields.get("caption")) if isinstance(fields, dict) else None
