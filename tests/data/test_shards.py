"""Tar shards: the same sequence of batches on any number of ranks and in resumed runs."""

import gc
import io
import json
import tarfile
import threading
import warnings
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from ldm.data.dataset import UnreadableSample
from ldm.data.drawings import EmojiTransform
from ldm.data.folder import ImageFolder
from ldm.data.http_stream import HTTPStream
from ldm.data.pack import write_shards
from ldm.data.shards import Shards, decode_sample, expand_patterns, read_shard
from ldm.data.transforms import PhotoTransform

EMOJI = Path(__file__).parent / "emoji"
SHARD_SIZES = (5, 1, 7, 2, 4)  # samples in each shard
SQUARE = PhotoTransform(size=8)
BUCKETS = PhotoTransform(size=8, buckets={"step": 4})


def make_png(number, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, numbers = tmp_path_factory.mktemp("shards"), iter(range(sum(SHARD_SIZES)))
    for shard, count in enumerate(SHARD_SIZES):
        members = {}
        for number in islice(numbers, count):
            size, stem = (16, 4) if number % 3 == 0 else (8, 8), f"{number:03}"
            members |= {f"{stem}.png": make_png(number, size), f"{stem}.txt": b"%d" % number}
            members[f"{stem}.json"] = json.dumps({"width": number}).encode()
        write_tar(path / f"{shard:03}.tar", members)
    return path


def open_source(folder, transform=SQUARE, **options):
    options = {"streams": 3, "shuffle": 4} | options
    return Shards(f"{folder}/{{000..004}}.tar", transform, 7, **options)


def read(source, count, **options):
    return list(islice(source.iter_batches(2, **options), count))


def list_texts(batches):
    return [text for batch in batches for text in batch["txt"]]


@pytest.mark.parametrize("transform", [SQUARE, BUCKETS])
@pytest.mark.parametrize(
    ("start", "rank", "world_size", "workers"),
    [(0, 0, 2, 0), (0, 1, 2, 0), (5, 3, 4, 0), (29, 0, 1, 0), (3, 1, 2, 2)],
)
def test_ranks_and_workers_share_a_sequence(folder, transform, start, rank, world_size, workers):
    expected = read(open_source(folder, transform), 40)[start + rank :: world_size]
    options = {"start": start, "rank": rank, "world_size": world_size, "workers": workers}
    batches = read(open_source(folder, transform), len(expected), **options)
    assert list_texts(batches) == list_texts(expected)
    assert all(torch.equal(b["jpg"], e["jpg"]) for b, e in zip(batches, expected, strict=True))


def test_every_epoch_of_a_stream_holds_each_sample_once_in_another_order(folder):
    batches = read(open_source(folder, streams=1), 20)  # 19 samples: 10 batches, the last smaller
    epochs = list_texts(batches[:10]), list_texts(batches[10:])
    assert all(Counter(epoch) == Counter(map(str, range(19))) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("streams", [1, 2, 3, 5])
def test_an_epoch_of_shards_of_one_size_holds_each_sample_once(streams, tmp_path):
    for shard in range(5):
        members = {f"{k}.png": make_png(4 * shard + k) for k in range(4)}
        members |= {f"{k}.txt": b"%d" % (4 * shard + k) for k in range(4)}
        write_tar(tmp_path / f"{shard}.tar", dict(sorted(members.items())))
    batches = read(Shards(f"{tmp_path}/*.tar", SQUARE, streams=streams), 30)
    epochs = [list_texts(batches[k : k + 10]) for k in (0, 10, 20)]
    assert all(Counter(epoch) == Counter(map(str, range(20))) for epoch in epochs)


def test_samples_outside_the_limits_are_skipped(folder):
    batches = read(open_source(folder, minimum={"width": 5}, maximum={"width": 15}), 20)
    assert set(list_texts(batches)) == set(map(str, range(5, 16)))


def test_damaged_samples_and_shards_are_named_and_replaced(folder, tmp_path):
    intact = (folder / "002.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(intact[: len(intact) // 2 - 300])
    images = {"1.png": make_png(1)[:30], "2.jpg": make_png(2)}
    write_tar(tmp_path / "a.tar", dict(sorted({**images, "1.txt": b"x", "3.txt": b"x"}.items())))
    batches = read(Shards([str(tmp_path / "*.tar")], SQUARE, streams=2), 16)
    assert all(batch["jpg"].isfinite().all() for batch in batches)
    unreadable = {name for batch in batches for name in batch.get("unreadable", [])}
    assert unreadable == {"a.tar/1", "a.tar/3", "b.tar"}
    (tmp_path / "a.tar").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no sample of 1 can be read: a.tar"):
        read(Shards(str(tmp_path / "a.tar"), SQUARE), 1)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"0.txt": b"\xef\xbb\xbfa fox\r\n"}, "a fox"),
        ({"0.TXT": "a fox".encode("utf-16")}, "a fox"),
        ({"0.caption": b"a fox\n"}, "a fox"),
        ({"0.json": b'\xef\xbb\xbf{"caption": " a fox", "text": null}'}, "a fox"),
        ({"0.json": b'{"text": ["a fox ", "a red fox", ""]}'}, ["a fox", "a red fox"]),
        ({"0.json": b'{"text": 7}'}, "7"),
        ({}, ""),
    ],
)
def test_captions_of_any_format_are_read_and_hidden_members_skipped(members, expected, tmp_path):
    images = {"./.cache/1.jpg": make_png(1), "._0.jpg": b"", "0.JPE": make_png(0)}
    write_tar(tmp_path / "a.tar", {**images, **members})
    (raw,) = read_shard(str(tmp_path / "a.tar"))
    assert decode_sample(raw)["text"] == expected


@pytest.mark.parametrize("members", [{"0.txt": b"caf\xe9"}, {"0.json": b'{"text": {"a": 1}}'}])
def test_captions_that_cannot_be_read_are_named(members, tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": make_png(0), **members})
    with pytest.raises(UnreadableSample, match="neither UTF-8|neither a text nor a list"):
        decode_sample(next(read_shard(str(tmp_path / "a.tar"))))


def test_fixed_samples_come_from_the_first_shards(folder):
    source = open_source(folder)
    assert [sample["txt"] for sample in source.load_fixed_samples(7)] == list("0123456")
    assert len(source.load_fixed_samples(30)) == 30
    samples = open_source(folder, BUCKETS).load_fixed_samples(4)
    assert [sample["txt"] for sample in samples] == list("1245")  # all of one bucket


def test_commands_are_run_only_if_that_is_allowed(folder):
    command = f"pipe:cat {folder}/{{000..001}}.tar"
    with pytest.raises(ValueError, match="is a command, which a config may not run"):
        Shards(command, SQUARE)
    assert set(list_texts(read(Shards(command, SQUARE, allow_commands=True), 6))) == set("012345")
    with pytest.raises(OSError, match="failed with code 3"):
        list(read_shard(f"pipe:cat {folder}/000.tar; exit 3"))


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("s3://bucket/{000..004}.tar", "cannot be read, only files and http"),
        ("/nowhere/{000..004}.tar", "no shard `/nowhere/000.tar`"),
        ("/nowhere/*.tar", r"no shard `/nowhere/\*.tar`"),
        ("{0..99}.tar", "more than 9 shards"),
        ("{0", "Unbalanced braces"),
        ([], "names no files"),
    ],
)
def test_shards_that_cannot_be_read_are_named(shards, message, monkeypatch):
    monkeypatch.setattr("ldm.data.shards.MAX_SHARDS", 9)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        expand_patterns(shards)


class FlakyHandler(SimpleHTTPRequestHandler):
    """Closes the connection in the middle of the first response for each file."""

    num_requests: ClassVar[Counter[str]] = Counter()

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.exists():
            return self.send_error(404)
        data, start = path.read_bytes(), int(self.headers["Range"][6:-1])
        self.send_response(206)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.num_requests[self.path] += 1
        self.wfile.write(data[start : len(data) // 2 if not start else None])

    def log_message(self, *_):
        pass


def test_streams_reconnect_after_lost_connections(folder):
    handler = partial(FlakyHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with HTTPStream(f"{url}/002.tar", retry_delay=0) as file:
            assert file.readall() == (folder / "002.tar").read_bytes()
        assert FlakyHandler.num_requests["/002.tar"] == 2
        with pytest.raises(FileNotFoundError, match="404"):
            HTTPStream(f"{url}/nothing.tar").read(1)
        server.shutdown()


def test_webdataset_reads_what_we_pack(tmp_path):
    import webdataset

    folder = ImageFolder(root=EMOJI, transform=EmojiTransform(size=16), split="train")
    paths = list(write_shards(folder, str(tmp_path / "emoji-%03d.tar"), count=10))
    assert [path.name for path in paths] == [f"emoji-00{k}.tar" for k in range(3)]
    read_by_us = [raw["png"] for path in paths for raw in read_shard(str(path))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files open
        reader = webdataset.WebDataset(list(map(str, paths)), shardshuffle=False)
        read_by_webdataset = [raw["png"] for raw in reader]
        gc.collect()
    assert read_by_us == read_by_webdataset == [folder.read_bytes(k) for k in range(23)]
    batch = read(Shards(str(tmp_path / "*.tar"), EmojiTransform(size=16)), 1)[0]
    assert batch["jpg"].shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="no placeholder for a number"):
        list(write_shards(folder, str(tmp_path / "emoji.tar")))
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        list(write_shards(folder, str(tmp_path / "%d.tar"), count=0))
