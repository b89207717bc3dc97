"""Checkpoint files: both formats written and read, EMA weights, damaged files, hashes."""

import hashlib
import json
import os
import struct
import time

import pytest
import torch

from ldm.loading.files.checkpoint import (
    compute_short_hash,
    read_checkpoint,
    use_ema_weights,
    write_checkpoint,
)
from ldm.runtime.hashes import find_cached_sha256

STATE = {
    "model.diffusion_model.in.weight": torch.arange(12.0).view(3, 4),
    "model.diffusion_model.in.bias": torch.ones(3),
    "betas": torch.linspace(0, 1, 10),
}
EMA = {
    "model_ema.diffusion_modelinweight": torch.full((3, 4), 7.0),
    "model_ema.diffusion_modelinbias": torch.full((3,), 8.0),
}
COUNTERS = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".CKPT", ".SafeTensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_written_weights_are_read_back(tmp_path, suffix, dtype):
    state = {name: value.to(dtype) for name, value in STATE.items()}
    path = tmp_path / f"x{suffix}"
    write_checkpoint(path, state, {"global_step": 12, "author": "me"})
    file = read_checkpoint(path)
    torch.testing.assert_close(file.state_dict, state, rtol=0, atol=0)  # dtypes, too
    assert file.step == 12
    assert file.memory_mapped
    assert os.listdir(tmp_path) == [path.name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_tensors_that_share_memory_are_written_separately(tmp_path):
    storage = torch.arange(1000.0)
    state = {"a": storage[:10], "b": storage[5:15], "c": storage.view(10, 100).T}
    for suffix in (".ckpt", ".safetensors"):
        write_checkpoint(tmp_path / f"x{suffix}", state)
        read = read_checkpoint(tmp_path / f"x{suffix}").state_dict
        assert all(torch.equal(read[name], state[name]) for name in state)
        assert (tmp_path / f"x{suffix}").stat().st_size < 8000


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, STATE)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(path, {"a": torch.ones(1)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in"):
        write_checkpoint(tmp_path / "x.bin", STATE)


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        ({}, "no EMA weights"),
        (COUNTERS, "no EMA weights"),
        (EMA | {"model_ema.what": torch.ones(1)},
         "(?s)1 EMA weights do not belong to the model: `model_ema.*load it with `ema=False`"),
    ],
)  # fmt: skip
def test_missing_or_unknown_ema_weights_are_an_error(tmp_path, ema, message):
    torch.save({**STATE, **ema}, tmp_path / "x.ckpt")
    file = read_checkpoint(tmp_path / "x.ckpt")
    assert file.has_ema == (len(ema) > 2)
    with pytest.raises(ValueError, match=message):
        use_ema_weights(
            file.state_dict, file.ema_state_dict, {name: name for name in STATE}, file.path
        )


def test_the_format_is_recognized_by_content_not_by_suffix(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", STATE)
    (tmp_path / "x.safetensors").rename(tmp_path / "y.ckpt")
    torch.save(STATE, tmp_path / "z.safetensors")
    assert read_checkpoint(tmp_path / "y.ckpt").format == "safetensors"
    assert read_checkpoint(tmp_path / "z.safetensors").format == "zip"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "contains no weights"),
        ([torch.ones(2)], "contains a list, not weights by name"),
        ({"a": torch.eye(3).to_sparse()}, "`a` is quantized, nested, sparse or complex"),
    ],
)
def test_a_file_without_plain_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_a_file_truncated_in_its_header_is_reported_as_damaged(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", STATE)
    for length in (9, 50):
        (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:length])
        with pytest.raises(ValueError, match=r"y\.safetensors` is damaged, perhaps an incomplete"):
            read_checkpoint(tmp_path / "y.safetensors")


@pytest.mark.parametrize("fraction", [0.2, 0.8])  # in its pickle, in its tensors
def test_a_truncated_legacy_file_is_reported_as_damaged(fraction, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.ones(400)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: round(fraction * len(content))])
    with pytest.raises(ValueError, match=r"x\.ckpt` is damaged, perhaps an incomplete download"):
        read_checkpoint(path)


def test_a_pickle_that_contains_itself_is_refused_in_bounded_time(tmp_path):
    content = dict.fromkeys(map(str, range(2000)), 0)
    wrappers = ("state_dict", "model_state_dict", "model", "module", "weights")
    content.update(dict.fromkeys(wrappers, content))
    torch.save(content, tmp_path / "x.ckpt")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"x\.ckpt` is refused: its pickle contains itself"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert time.monotonic() - start < 60  # hours without the bound


def make_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Make the bytes of a file; `length` is the stated size of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def make_entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


MALFORMED = {
    "header longer than the file": make_file({}, length=1 << 40),
    "header of a gigabyte": make_file({}, length=1 << 30),
    "overlap": make_file({"a": make_entry(0, 8, [2]), "b": make_entry(4, 12, [2])}, bytes(12)),
    "hole": make_file({"a": make_entry(0, 4, [1]), "b": make_entry(8, 12, [1])}, bytes(12)),
    "short data": make_file({"a": make_entry(0, 8, [2])}, bytes(4)),
    "trailing data": make_file({"a": make_entry(0, 4, [1])}, bytes(40)),
    "shape overflow": make_file({"a": make_entry(0, 4, [1 << 62, 8])}, bytes(4)),
    "shape and bytes differ": make_file({"a": make_entry(0, 4, [3])}, bytes(4)),
    "negative side": make_file({"a": make_entry(0, 4, [-1])}, bytes(4)),
    "negative offset": make_file({"a": make_entry(-4, 4, [2])}, bytes(8)),
    "unknown dtype": make_file({"a": make_entry(0, 4, [1], "X9")}, bytes(4)),
    "same name twice": make_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "metadata not text": make_file(
        {"__metadata__": {"a": [1]}, "a": make_entry(0, 4, [1])}, bytes(4)
    ),
    "not JSON": make_file(b"{" + bytes(50)),
    "no tensors": make_file({}),
    "too many tensors": make_file({f"t{i}": make_entry(0, 0, [0]) for i in range(30_000)}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors_files_are_refused(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(ValueError, match=r"damaged|too large|too many|not a checkpoint|no weights"):
        read_checkpoint(path)


def test_a_changed_byte_causes_at_most_a_value_error(tmp_path):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, STATE)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        position = int(torch.randint(len(content), (), generator=generator))
        value = int(torch.randint(256, (), generator=generator))
        path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_hashes_depend_on_the_content_of_files_and_folders(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    assert compute_short_hash(tmp_path / "x.safetensors") == "ba7816bf8f"
    assert compute_short_hash(tmp_path) == "ba7816bf8f"
    (tmp_path / "x.safetensors").write_bytes(b"abcd")
    assert compute_short_hash(tmp_path / "x.safetensors") == "88d4266fd4"


def test_the_hash_of_a_large_folder_is_cached_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.runtime.hashes.LARGE_FILE_BYTES", 7)
    files = [tmp_path / name / "model.safetensors" for name in ("unet", "vae")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(file.parent.name.encode())
    assert find_cached_sha256(*files) is None
    digest = hashlib.sha256(b"unetvae").hexdigest()
    assert compute_short_hash(tmp_path) == digest[:10]
    assert find_cached_sha256(*files) == digest
    files[1].write_bytes(b"new")
    assert find_cached_sha256(*files) is None
    assert compute_short_hash(tmp_path) == hashlib.sha256(b"unetnew").hexdigest()[:10]
