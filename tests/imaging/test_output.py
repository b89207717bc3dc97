import multiprocessing

import pytest
from PIL import Image

from ldm.imaging.metadata import read_info
from ldm.imaging.output import OutputFolder


@pytest.fixture
def image():
    return Image.new("RGB", (8, 8), "red")


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _save_many(outdir, writer, number):
    folder = OutputFolder(outdir)
    for k in range(number):
        folder.save_sample(Image.new("RGB", (8, 8)), {"prompt": f"{writer} {k}"})


def test_names_are_those_of_the_original(tmp_path, image):
    folder = OutputFolder(tmp_path / "new" / "out")
    assert folder.save_sample(image, {}) == tmp_path / "new/out/samples/00000.png"
    assert folder.save_sample(image, {}) == tmp_path / "new/out/samples/00001.png"
    assert folder.save_grid(image, {}) == tmp_path / "new/out/grid-0000.png"
    assert folder.save_grid(image, {}) == tmp_path / "new/out/grid-0001.png"


def test_named_images_lie_in_the_folder_and_are_not_written_over(tmp_path, image):
    folder = OutputFolder(tmp_path / "out", "dog")
    assert folder.save_sample(image, {}) == tmp_path / "out/dog.png"
    assert folder.save_sample(image, {}) == tmp_path / "out/dog-1.png"
    assert OutputFolder(tmp_path / "out", "dog").save_sample(image, {}).name == "dog-2.png"
    assert _names(tmp_path / "out") == ["dog-1.png", "dog-2.png", "dog.png"]


def test_numbers_go_on_after_the_highest_whatever_was_deleted_or_added(tmp_path, image):
    first = OutputFolder(tmp_path)
    paths = [first.save_sample(image, {}) for _ in range(4)]
    paths[1].unlink()
    (first.samples / "notes.txt").touch()
    (first.samples / "00009_edited.png").touch()
    assert OutputFolder(tmp_path).save_sample(image, {}).name == "00004.png"
    (first.samples / "123456.png").touch()
    assert OutputFolder(tmp_path).save_sample(image, {}).name == "123457.png"


def test_a_run_never_gives_the_same_number_twice(tmp_path, image):
    folder = OutputFolder(tmp_path)
    folder.save_sample(image, {}).unlink()
    assert folder.save_sample(image, {}).name == "00001.png"


def test_a_file_that_another_process_finished_meanwhile_is_kept(tmp_path, image, monkeypatch):
    folder = OutputFolder(tmp_path)
    (folder.samples / "00000.png").write_text("another's")
    monkeypatch.setattr("ldm.imaging.output._highest", lambda *_: -1)
    assert folder.save_sample(image, {}).name == "00001.png"
    assert (folder.samples / "00000.png").read_text() == "another's"
    assert _names(folder.samples) == ["00000.png", "00001.png"]


def test_a_number_that_another_process_is_writing_is_skipped(tmp_path, image):
    folder = OutputFolder(tmp_path)
    (folder.samples / ".00000.png.part").touch()
    assert folder.save_sample(image, {}).name == "00001.png"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing_and_frees_the_number(tmp_path, image, monkeypatch, error):
    folder = OutputFolder(tmp_path)

    def fail(path, *_):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("ldm.imaging.output.write_png", fail)
        with pytest.raises(error):
            folder.save_sample(image, {})
    assert _names(folder.samples) == []
    assert folder.save_sample(image, {}).name == "00000.png"


def test_processes_that_share_a_folder_lose_no_image(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_save_many, args=(tmp_path, w, 10)) for w in "ab"]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    prompts = {read_info(path)["prompt"] for path in (tmp_path / "samples").iterdir()}
    assert prompts == {f"{w} {k}" for w in "ab" for k in range(10)}
    assert _names(tmp_path / "samples") == [f"{k:05d}.png" for k in range(20)]
