"""Output folders: numbering; no file is overwritten, lost or left incomplete."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.imaging.metadata import read_info, write_png
from ldm.imaging.output import OutputFolder

IMAGE = Image.new("RGB", (8, 8), "red")


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_names_are_those_of_the_original(tmp_path):
    folder = OutputFolder(tmp_path / "new" / "out")
    paths = [save(IMAGE, {}) for save in 2 * [folder.save_sample, folder.save_grid]]
    assert [str(path.relative_to(folder.path)) for path in paths] == [
        "samples/00000.png", "grid-0000.png", "samples/00001.png", "grid-0001.png",
    ]  # fmt: skip


def test_named_images_are_never_overwritten(tmp_path):
    for _ in range(2):
        folder = OutputFolder(tmp_path, "dog")
        for _ in range(2):
            folder.save_sample(IMAGE, {})
    assert list_names(tmp_path) == ["dog-1.png", "dog-2.png", "dog-3.png", "dog.png"]


def test_numbers_continue_after_the_highest_whatever_was_deleted_or_added(tmp_path):
    first = OutputFolder(tmp_path)
    paths = [first.save_sample(IMAGE, {}) for _ in range(4)]
    paths[1].unlink()
    (first.samples / "notes.txt").touch()
    (first.samples / "00009_edited.png").touch()
    assert OutputFolder(tmp_path).save_sample(IMAGE, {}).name == "00004.png"
    (first.samples / "123456.png").touch()
    assert OutputFolder(tmp_path).save_sample(IMAGE, {}).name == "123457.png"


def test_a_run_never_uses_the_same_number_twice(tmp_path):
    folder = OutputFolder(tmp_path)
    folder.save_sample(IMAGE, {}).unlink()
    assert folder.save_sample(IMAGE, {}).name == "00001.png"


def test_numbers_of_other_processes_are_skipped(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path)
    (folder.samples / "00000.png").write_text("written since the folder was listed")
    (folder.samples / ".00001.png.part").touch()
    monkeypatch.setattr("ldm.imaging.output._find_highest_number", lambda *_: -1)
    assert folder.save_sample(IMAGE, {}).name == "00002.png"
    assert list_names(folder.samples) == [".00001.png.part", "00000.png", "00002.png"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing_and_frees_the_number(tmp_path, monkeypatch, error):
    folder = OutputFolder(tmp_path)

    def fail(path, *_):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("ldm.imaging.output.write_png", fail)
        with pytest.raises(error):
            folder.save_sample(IMAGE, {})
    assert list_names(folder.samples) == []
    assert folder.save_sample(IMAGE, {}).name == "00000.png"


def test_a_number_stays_reserved_while_the_depth_is_written(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path)
    reserved = []

    def write(path, *args):
        reserved.append((folder.samples / ".00000.png.part").exists())
        write_png(path, *args)

    monkeypatch.setattr("ldm.imaging.output.write_png", write)
    folder.save_sample(IMAGE, {}, depth=Image.new("I;16", (8, 8)))
    assert reserved == [True, True]
    assert list_names(folder.samples) == ["00000.png", "00000_depth.png"]


def test_processes_that_share_a_folder_lose_no_image(tmp_path):
    code = """if True:
        import sys
        from PIL import Image
        from ldm.imaging.output import OutputFolder
        folder = OutputFolder(sys.argv[1])
        for k in range(10):
            folder.save_sample(Image.new("RGB", (8, 8)), {"prompt": f"{sys.argv[2]} {k}"})"""
    root = Path(__file__).parents[2]
    commands = ([sys.executable, "-c", code, str(tmp_path), writer] for writer in "ab")
    processes = [subprocess.Popen(command, cwd=root) for command in commands]
    assert [process.wait() for process in processes] == [0, 0]
    prompts = {read_info(path)["prompt"] for path in (tmp_path / "samples").iterdir()}
    assert prompts == {f"{writer} {k}" for writer in "ab" for k in range(10)}
    assert list_names(tmp_path / "samples") == [f"{k:05d}.png" for k in range(20)]
