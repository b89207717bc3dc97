"""`ldm check-data`: folders and shards are checked and packed."""

import tarfile

import pytest
from PIL import Image

from imaging.badimages import UNREADABLE_FILES
from ldm.commands.check_data import main
from ldm.data.check import check_data


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for name, (write, _) in UNREADABLE_FILES.items():
        if name != "folder":
            write(root / f"{name}.png")
    for number, size in enumerate([(300, 300), (300, 300), (600, 300), (80, 160)]):
        Image.new("RGB", size, (number, 0, 0)).save(root / f"{number}.png")
    (root / "0.txt").write_text("the same")
    (root / "1.txt").write_text("the same")
    (root / "2.txt").write_text("another")
    Image.new("RGB", (300, 300)).save(root / "words.png")
    (root / "words.txt").write_bytes(b"caf\xe9")
    (root / "copy.png").write_bytes((root / "0.png").read_bytes())
    return root


def test_unreadable_images_copies_and_captions_are_counted(photos, capsys):
    assert main([str(photos), "--size", "256", "--list", str(photos / "broken.txt")]) == 1
    out = capsys.readouterr().out
    assert "5 images can be read, 10 are unreadable" in out
    assert "`huge.png` has more than 100000000 pixels" in out
    assert "words.txt:1: neither UTF-8 nor UTF-16" in out
    assert "1 images are copies of others" in out
    assert "2 have no caption\n  3.png\n  copy.png\n" in out
    assert "1 captions are copies of others\n  2 x `the same`" in out
    assert "256 – 511        4 ####" in out
    assert "256 x 256        3 ####" in out
    assert "320 x 192        0" not in out
    assert "cut.png" in (photos / "broken.txt").read_text().splitlines()


def test_a_folder_is_packed_and_its_shards_are_checked(photos, tmp_path, capsys):
    assert main([str(photos), "--pack", str(tmp_path / "%03d.tar"), "--count", "8"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        str(tmp_path / f"00{number}.tar") for number in range(2)
    ]
    report = check_data([str(tmp_path / "{000..001}.tar")])
    assert sum(report.sizes.values()) == 5
    assert report.unreadable_samples == []
    assert report.captions == {"the same": 2, "another": 1}
    shards = str(tmp_path / "*.tar")
    assert main([shards, "--pack", "%d.tar"]) == 1
    message = f"only a folder of images can be packed, not `{shards}` (--pack)\n"
    assert capsys.readouterr().err.endswith(message)


def test_paths_may_begin_in_the_home_folder(photos, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(photos.parent))
    monkeypatch.setenv("USERPROFILE", str(photos.parent))
    (photos / "cut.png").unlink()
    assert main(["~/photos", "--pack", "~/shards/%d.tar"]) == 1
    assert main(["~/shards/{0..0}.tar"]) == 0
    assert "5 images can be read, 0 are unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--size", "--step", "--workers", "--count"])
def test_a_number_below_1_is_refused_with_its_flag(photos, flag, capsys):
    with pytest.raises(SystemExit):
        main([str(photos), flag, "0"])
    assert f"argument {flag}: `0` is not a positive whole number" in capsys.readouterr().err


def test_a_list_without_a_folder_is_refused_before_images_are_read(photos, tmp_path, capsys):
    assert main([str(photos), "--list", str(tmp_path / "no/list.txt")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("no` to save `list.txt` in (--list)\n")


def test_nothing_to_read_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "nope")]) == 1
    assert "there is no folder or file `" in capsys.readouterr().err
    assert main([str(tmp_path / "nope-{0..2}.tar")]) == 1
    assert "nope-0.tar`" in capsys.readouterr().err
    tarfile.open(tmp_path / "empty.tar", "w").close()
    assert main([str(tmp_path / "empty.tar")]) == 1
    assert "0 images can be read, 0 are unreadable" in capsys.readouterr().out
