"""`ldm download` from a server with the hub's protocol, and names of files on the hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.errors import OfflineModeIsEnabled

from ldm.app.catalog import read_catalog
from ldm.commands.main import main
from ldm.loading import published
from ldm.loading.hub import download_url
from ldm.loading.load import load
from ldm.loading.published import resolve_checkpoint
from ldm.runtime.errors import DownloadError
from ldm.runtime.hashes import find_cached_sha256
from ldm.train.runs.initial_weights import load_initial_weights

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "checkpoints/demo.safetensors"
FIRST, SECOND = "first/one/a.safetensors", "second/two/b.ckpt"  # sources of the file `small`
COMMIT = "0123456789" * 4
CONTENT = os.urandom(2_000_000)
WRONG = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
SHA256, WRONG_SHA256 = (hashlib.sha256(content).hexdigest() for content in (CONTENT, WRONG))


class Hub(ThreadingHTTPServer):
    """A server of `files` by `owner/name/path`: bytes, or a status and an error code.

    `locations` are redirections; `requests` get (method, file, range, token); `max_sent_bytes`
    cuts the next file.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.etags, self.locations, self.requests = {}, {}, {}, []
        self.max_sent_bytes = None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def get_requests(self):
        return [request[1:3] for request in self.requests if request[0] == "GET"]


class Handler(BaseHTTPRequestHandler):
    """Responds as the hub does."""

    def do_GET(self):
        hub, name = self.server, self.path[1:].partition("?")[0]
        if name.startswith("api/"):
            return self.list_files(name.removeprefix("api/models/"))
        name = name.replace("/resolve/main/", "/").replace(f"/resolve/{COMMIT}/", "/")
        token, bytes_range = self.headers["Authorization"], self.headers["Range"]
        hub.requests.append((self.command, name, bytes_range, token))
        content = hub.files.get(name, (401, "RepoNotFound"))
        if isinstance(content, tuple):
            return self.reply(content[0], {"X-Error-Code": content[1]})
        etag, length = hub.etags.get(name, hashlib.sha256(content).hexdigest()), len(content)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Size": str(length)}
        if name in hub.locations:
            headers["Location"] = f"http://localhost:{hub.server_port}/{hub.locations[name]}"
            return self.reply(302, headers)
        start = int((bytes_range or "bytes=0-")[6:-1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{length - 1}/{length}"
        self.reply(206 if start else 200, headers, content[start:])

    do_HEAD = do_GET

    def list_files(self, repo):
        sizes = {name: len(c) for name, c in self.server.files.items() if name.startswith(repo)}
        files = [{"rfilename": n.removeprefix(f"{repo}/"), "size": s} for n, s in sizes.items()]
        model = {"id": repo, "sha": COMMIT, "cardData": {"license": "mit"}, "siblings": files}
        self.reply(200 if files else 401, {"X-Error-Code": ""}, json.dumps(model).encode())

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            is_file = "ETag" in headers
            self.wfile.write(body[: self.server.max_sent_bytes] if is_file else body)
            self.server.max_sent_bytes = None if is_file else self.server.max_sent_bytes

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch, cache):
    """A server that the hub's client uses in this test, with an empty cache."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "ldm-cache"))
    with Hub() as server:
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


def use_endpoint(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture(autouse=True)
def write_table(hub, monkeypatch, tmp_path):
    """Replaces the table of published files by one row, `small`, with two sources and a SHA-256."""
    monkeypatch.setattr(published, "TABLE_PATH", tmp_path / "table.csv")

    def write_table(sha256):
        header = "name,title,license,weights_gb,size,sha256,sources"
        row = f"small,Small,mit,0.1,~2000000,{sha256},{FIRST} {SECOND}"
        published.TABLE_PATH.write_text(f"{header}\n{row}\n")
        published.read_published_files.cache_clear()

    write_table(SHA256)
    yield write_table
    published.read_published_files.cache_clear()


@pytest.fixture
def download(capsys):
    """Runs `ldm download`; returns the exit status, stdout, and the lines of stderr."""

    def download(*args):
        capsys.readouterr()
        status = main(["download", *args])
        out, err = capsys.readouterr()
        return status, out.strip(), err.splitlines()

    return download


def list_cached_files(cache):
    return [path for path in cache.glob("*/snapshots/**/*") if path.is_file()]


def write_partial_file(cache, content):
    """Write the partial file of an interrupted download."""
    path = cache / f"models--first--one/blobs/{SHA256}.incomplete"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_a_file_is_downloaded_once_and_then_found_by_name(hub, download, tmp_path, monkeypatch):
    hub.files[FIRST] = CONTENT
    status, out, err = download("small")
    path = Path(out)
    assert (status, err[0]) == (0, "small: Small, 0.00 GB, license mit")
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert find_cached_sha256(path) == SHA256
    assert download("small")[:2] == (0, out)
    assert resolve_checkpoint("small") == path
    assert len(hub.get_requests) == 1
    assert out in download()[1]
    monkeypatch.chdir(tmp_path)
    Path("small").touch()
    assert resolve_checkpoint("small") == Path("small")


@pytest.mark.parametrize("name", ["smal", "small"])
def test_loading_a_missing_file_does_not_download_it(hub, name):
    with pytest.raises(FileNotFoundError, match=r"did you mean `small`|; run `ldm download small`"):
        load(ckpt=name)
    assert hub.requests == []


def test_another_process_continues_an_interrupted_download(hub, cache):
    hub.files[FIRST] = CONTENT
    partial = write_partial_file(cache, CONTENT[:1_500_000])
    code = (
        "import pathlib, sys, ldm.loading.published as m; m.TABLE_PATH = pathlib.Path(sys.argv[1]);"
    )
    code += " print(m.download_checkpoint('small'))"
    command = [sys.executable, "-c", code, published.TABLE_PATH]
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": str(cache)}
    env = {**os.environ, **env, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).read_bytes() == CONTENT
    assert hub.get_requests == [(FIRST, "bytes=1500000-")]
    assert not partial.exists()


def test_an_interrupted_download_is_resumed(hub, download, cache, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.files[FIRST], hub.max_sent_bytes = CONTENT, 1_000_000
    assert download("small")[0] == 0
    assert [range_ for _, range_ in hub.get_requests] == [None, "bytes=1000000-"]
    assert list_cached_files(cache)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("size", [1000, len(CONTENT) + 1])
def test_a_damaged_partial_file_is_downloaded_again(hub, download, cache, size):
    hub.files[FIRST] = CONTENT
    write_partial_file(cache, b"x" * size)
    assert download("small")[0] == 0
    assert list_cached_files(cache)[0].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ((401, "RepoNotFound"), "`first/one` is not found, or private"),
        ((401, ""), "`first/one` is not found, or private"),
        ((403, "GatedRepo"), "`first/one` is gated: accept its license on "),
        ((404, "EntryNotFound"), "`first/one` does not have this file"),
        ((403, ""), "`first/one` is refused: the server says 403"),
        (WRONG, f"SHA-256 mismatch for `{FIRST}`: expected {SHA256}, got {WRONG_SHA256}"),
    ],
    ids=["gone", "refused", "gated", "missing", "forbidden", "wrong"],
)
def test_the_next_source_is_tried_after_an_error(hub, download, cache, response, reason):
    hub.files |= {FIRST: response, SECOND: CONTENT}
    status, out, err = download("small")
    assert status == 0
    assert err[1].startswith(reason)
    assert [Path(out)] == list_cached_files(cache)
    assert [name for name, _ in hub.get_requests] == [SECOND]


def test_a_file_with_another_hash_than_the_hub_states_is_deleted(hub, download, cache):
    hub.files[FIRST], hub.etags[FIRST] = WRONG, SHA256
    status, _, (*_, first, second, last) = download("small")
    assert status == 1
    assert first == f"SHA-256 mismatch for `{FIRST}`: expected {SHA256}, got {WRONG_SHA256}"
    assert second == "`second/two` is not found, or private"
    assert "error: small cannot be downloaded from any of its 2 sources" in last
    assert list_cached_files(cache) + list(cache.rglob("*.incomplete")) == []


def test_a_url_outside_the_hub_is_downloaded_once_and_verified(hub, monkeypatch):
    hub.files |= {"release/v1/a.pth": CONTENT, "store/a/b": CONTENT, "release/v1/b.pth": WRONG}
    hub.locations["release/v1/a.pth"] = "store/a/b"
    url = f"{constants.ENDPOINT}/release/v1/a.pth"
    path = download_url(url, len(CONTENT), SHA256)
    assert path.read_bytes() == CONTENT
    num_requests = len(hub.get_requests)
    assert download_url(url, len(CONTENT), SHA256) == path
    assert len(hub.get_requests) == num_requests
    other = url.replace("a.pth", "b.pth")
    with pytest.raises(DownloadError, match=f"expected {SHA256}, got {WRONG_SHA256}"):
        download_url(other, len(CONTENT), SHA256)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download_url(url, len(CONTENT), SHA256) == path
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download_url(other, len(CONTENT), SHA256)


def test_a_full_disk_and_a_missing_connection_are_one_line(hub, download, cache, monkeypatch):
    hub.files[FIRST] = CONTENT
    usage = namedtuple("usage", "free")(1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert "error: the disk is full: 0.00 GB are needed" in download("small")[2][-1]
    if Path("/dev/full").exists():
        write_partial_file(cache / "other", b"")
        partial = cache / f"models--first--one/blobs/{SHA256}.incomplete"
        partial.unlink()
        partial.symlink_to("/dev/full")
        assert "error: the disk is full: `" in download("small")[2][-1]
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert "error: no connection to http://127.0.0.1:9" in download("small")[2][-1]
    error = OfflineModeIsEnabled("HF_HUB_OFFLINE=1")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", Mock(side_effect=error))
    assert "error: HF_HUB_OFFLINE is set" in download("small")[2][-1]
    assert list_cached_files(cache) == []


def test_a_file_without_a_published_hash_is_unverified(hub, write_table, download, cache):
    write_table("")
    hub.files[FIRST] = CONTENT
    assert f"SHA-256 {SHA256}; none was published" in download("small")[2][-1]
    assert f"(unverified {SHA256})" in download()[1]
    list_cached_files(cache)[0].unlink()
    hub.files[FIRST] = WRONG
    assert f"expected {SHA256}, got {WRONG_SHA256}" in download("small")[2][1]


def test_a_modified_file_in_the_cache_is_not_used(hub, download, cache):
    hub.files[FIRST] = CONTENT
    assert download("small")[0] == 0
    list_cached_files(cache)[0].write_bytes(WRONG)
    with pytest.raises(FileNotFoundError, match="is not on this machine"):
        resolve_checkpoint("small")
    assert download("small")[0] == 0
    assert resolve_checkpoint("small").read_bytes() == CONTENT


def test_the_token_is_sent_to_the_hub_but_not_to_its_storage(hub, download, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files[FIRST] = hub.files["in/storage/x"] = CONTENT
    hub.locations[FIRST] = "in/storage/x"
    assert download("small")[0] == 0
    tokens = [(name, token) for _, name, _, token in hub.requests]
    assert tokens == [(FIRST, "Bearer hf_secret"), ("in/storage/x", None)]


def test_all_programs_find_a_downloaded_file_without_a_connection(
    hub, write_table, download, tmp_path, capsys, monkeypatch
):
    hub.files[FIRST] = DEMO.read_bytes()
    write_table(hashlib.sha256(hub.files[FIRST]).hexdigest())
    path = download("small")[1]
    connections = []
    monkeypatch.setattr("socket.socket.connect", lambda self, address: connections.append(address))
    monkeypatch.setattr("socket.getaddrinfo", lambda *names, **_: connections.append(names))

    assert main(["inspect-checkpoint", "small", "--no-probe"]) == 0
    assert "published   small, Small (SHA-256 " in capsys.readouterr().out
    args = "--ckpt small --vae small --steps 1 --n_samples 1 --n_iter 1 --H 64 --W 64 --outdir"
    assert main(["txt2img", *args.split(), str(tmp_path / "out")]) == 0
    assert "checkpoint: small, Small (by its SHA-256)" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "out/samples/00000.png")]) == 0
    assert load_initial_weights(load(ckpt="small"), {"ckpt_path": "small"})
    (tmp_path / "models").mkdir()
    assert str(read_catalog(tmp_path / "models").models["a.safetensors"].path) == path
    assert connections == []


def test_a_hub_uri_may_name_a_file_or_a_diffusers_folder(hub, cache):
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "safety_checker": ["a", "B"]}
    weights = "unet/diffusion_pytorch_model"
    names = [f"{weights}{suffix}" for suffix in (".safetensors", ".fp16.safetensors", ".bin")]
    files = dict.fromkeys([*names, "unet/config.json", "safety_checker/model.safetensors"], b"{}")
    hub.files["only/one/v1.ckpt"] = CONTENT
    files |= {"model_index.json": json.dumps(index).encode(), "v1.ckpt": CONTENT}
    hub.files |= {f"some/pipe/{name}": content for name, content in files.items()}
    folder = resolve_checkpoint("hf:some/pipe")
    downloaded = sorted(path.relative_to(folder).as_posix() for path in list_cached_files(cache))
    assert downloaded == ["model_index.json", "unet/config.json", f"{weights}.safetensors"]
    assert resolve_checkpoint("hf:some/pipe/v1.ckpt").read_bytes() == CONTENT
    assert resolve_checkpoint("hf:only/one").name == "v1.ckpt"
    num_requests = len(hub.requests)
    assert resolve_checkpoint("hf:some/pipe") == folder
    assert resolve_checkpoint("hf:only/one", download=False).name == "v1.ckpt"
    assert resolve_checkpoint("hf:some/pipe/v1.ckpt", download=False).name == "v1.ckpt"
    assert len(hub.requests) == num_requests
    with pytest.raises(OSError, match="has no file `v2.ckpt`; it has unet/"):
        resolve_checkpoint("hf:some/pipe/v2.ckpt")
    with pytest.raises(FileNotFoundError, match="machine; run `ldm download hf:some/other`"):
        resolve_checkpoint("hf:some/other", download=False)


def test_a_server_of_files_without_the_hubs_api_is_enough_for_a_file(hub, monkeypatch):
    monkeypatch.setattr(Handler, "list_files", lambda handler, repo: handler.reply(404, {}))
    hub.files["some/pipe/v1.ckpt"] = CONTENT
    assert resolve_checkpoint("hf:some/pipe/v1.ckpt").read_bytes() == CONTENT
    with pytest.raises(OSError, match="`some/other` is not found, or private"):
        resolve_checkpoint("hf:some/other/v1.ckpt")


def test_a_server_cannot_choose_where_files_are_written(hub, cache):
    hub.files["some/pipe/model_index.json"] = b'{"..": ["a", "B"]}'
    hub.files["some/pipe/../x.json"] = CONTENT
    with pytest.raises(OSError, match=r"file name `\.\./x.json` is refused"):
        resolve_checkpoint("hf:some/pipe")
    hub.files["some/pipe/v1.ckpt"], hub.etags["some/pipe/v1.ckpt"] = CONTENT, "../../x"
    with pytest.raises(OSError, match="does not answer as a hub does"):
        resolve_checkpoint("hf:some/pipe/v1.ckpt")
    assert [path.name for path in list_cached_files(cache)] == ["model_index.json"]
