from functools import partial
from pathlib import Path

import pytest
import torch

from ldm.runtime.errors import FileFormatError, describe_error
from ldm.runtime.files import compute_sha256, list_files, read_text, write_atomically

TEXT = "a fox\nein Füchslein, 狐狸\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_is_read_in_utf_8_and_utf_16(tmp_path, encoding, newline):
    path = tmp_path / "prompts.txt"
    path.write_text(TEXT, encoding, newline=newline)
    assert read_text(path) == TEXT


def test_byte_order_marks_of_concatenated_files_are_removed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(2 * "a fox\n".encode("utf-8-sig"))
    assert read_text(path) == "a fox\na fox\n"


@pytest.mark.parametrize(
    ("content", "line"), [("fox\nFüchslein".encode("cp1252"), 2), ("a fox".encode("utf-16-le"), 1)]
)
def test_the_error_for_another_encoding_names_the_line(tmp_path, content, line):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=rf"prompts\.txt:{line}: neither UTF-8"):
        read_text(path)


def test_a_hash_is_cached_until_the_file_changes(tmp_path):
    path, sizes = tmp_path / "model.ckpt", []
    path.write_bytes(b"a fox")
    digest = compute_sha256(path, progress=sizes.append)
    assert compute_sha256(path, progress=lambda size: sizes.append(-size)) == digest
    assert sizes == [5]
    path.write_bytes(b"two foxes")
    assert compute_sha256(path) != digest


def test_linked_files_are_listed_once_and_hidden_files_not_at_all(tmp_path):
    for name in ("models/a", "models/.b", "models/.cache/c", "models/people/d", "elsewhere/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, target in (("more", "../elsewhere"), ("same", "../elsewhere"), ("loop", ".")):
        (tmp_path / "models" / name).symlink_to(target, target_is_directory=True)
    files = [path.relative_to(tmp_path / "models") for path in list_files(tmp_path / "models")]
    assert [path.as_posix() for path in files] == ["a", "people/d", "more/e"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("write", [lambda file: file.write(b"a fox"), partial(torch.save, [1])])
def test_the_error_of_a_full_disk_names_the_file(tmp_path, write):
    path = tmp_path / "x.pt"
    with pytest.raises(OSError, match="No space") as caught, write_atomically(path):  # noqa: SIM117
        with open("/dev/full", "wb", buffering=0) as file:
            write(file)
    assert describe_error(caught.value) == f"{path}: No space left on device"
