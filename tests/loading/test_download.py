"""`ldm download` against a server that speaks the hub's protocol, and the names that it allows."""

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

from ldm.app.catalogue import read_catalogue
from ldm.commands.download import main
from ldm.commands.main import main as ldm_main
from ldm.loading import published
from ldm.loading.load import load
from ldm.loading.published import find_checkpoint
from ldm.runtime.hashes import known_sha256
from ldm.train.runs.initial import load_initial_weights

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "checkpoints/demo.safetensors"
COMMIT = "0123456789" * 4
CONTENT = os.urandom(2_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Hub(ThreadingHTTPServer):
    """Files by `owner/name/path`, or (status, error code); `locations` are where files are stored.

    `requests` are (method, file, range, token) in order; `sent` limits the bytes of the next GET.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.etags, self.locations, self.requests = {}, {}, {}, []
        self.sent = None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def gets(self):
        return [request[1:3] for request in self.requests if request[0] == "GET"]


class Handler(BaseHTTPRequestHandler):
    """The answers of the hub."""

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(None)

    def answer(self, body):
        if self.path.startswith("/api/"):
            return self.list_files()
        name = self.path[1:].replace("/resolve/main/", "/").replace(f"/resolve/{COMMIT}/", "/")
        log = (self.command, name, self.headers["Range"], self.headers["Authorization"])
        self.server.requests.append(log)
        content = self.server.files.get(name, (401, "RepoNotFound"))
        if isinstance(content, tuple):
            return self.reply(content[0], {"X-Error-Code": content[1], "Content-Length": "0"})
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        etag = self.server.etags.get(name, hashlib.sha256(content).hexdigest())
        size = str(len(content) - start)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Content-Length": size}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if location := self.server.locations.get(name):
            port = self.server.server_port
            headers |= {"Location": f"http://localhost:{port}/{location}", "Content-Length": "0"}
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": size}
            return self.reply(302, headers)
        sent, self.server.sent = self.server.sent, None if body is None else self.server.sent
        body = content[start:][:sent] if body is None else body
        return self.reply(206 if start else 200, headers, body)

    def list_files(self):
        repo = "/".join(self.path.partition("?")[0].split("/")[3:5])
        files = {n: c for n, c in self.server.files.items() if n.startswith(f"{repo}/")}
        names = [
            {"rfilename": name.removeprefix(f"{repo}/"), "size": len(content)}
            for name, content in files.items()
        ]
        if not names:
            return self.reply(401, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
        model = {"id": repo, "sha": COMMIT, "cardData": {"license": "mit"}, "siblings": names}
        text = json.dumps(model).encode()
        return self.reply(200, {"Content-Length": str(len(text))}, text)

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, to which the hub's client talks in this test, with an empty cache."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "remembered"))
    with Hub() as server:
        use(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
        yield server
        server.shutdown()


def use(monkeypatch, endpoint, cache):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Replaces the table: `table(sha256)` has one row, `small`, in two places."""

    def write(sha256):
        rows = f"small,Small,mit,0.1,~2000000,{sha256},first/one/a.safetensors second/two/b.ckpt"
        file = tmp_path / "table.csv"
        file.write_text(f"name,title,licence,memory,bytes,sha256,places\n{rows}\n")
        monkeypatch.setattr(published, "TABLE", file)
        published.published_files.cache_clear()

    yield write
    published.published_files.cache_clear()


def final_files(tmp_path):
    return [path for path in (tmp_path / "cache").glob("*/snapshots/**/*") if path.is_file()]


def test_a_file_is_downloaded_once_and_then_meant_by_its_name(hub, table, tmp_path, capsys):
    table(SHA256)
    hub.files["first/one/a.safetensors"] = CONTENT
    assert main(["small"]) == 0
    out, err = capsys.readouterr()
    path = Path(out.strip())
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert "small: Small, 0.00 GB, licence mit" in err
    assert known_sha256(path) == SHA256
    assert main(["small"]) == 0
    assert find_checkpoint("small") == path
    assert len(hub.gets) == 1
    assert main([]) == 0
    assert str(path) in capsys.readouterr().out


def test_an_existing_path_comes_before_a_published_name(hub, table, tmp_path, monkeypatch):
    del hub
    table(SHA256)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").touch()
    assert find_checkpoint("small") == Path("small")


@pytest.mark.parametrize("name", ["smal", "small"])
def test_what_is_not_here_is_not_downloaded_by_loading_it(hub, table, name):
    table(SHA256)
    with pytest.raises(
        FileNotFoundError, match=r"did you mean `small`|machine: ldm download small"
    ):
        load(ckpt=name)
    assert hub.requests == []


def test_another_process_continues_an_interrupted_download(hub, table, tmp_path):
    table(SHA256)
    hub.files["first/one/a.safetensors"] = CONTENT
    part = tmp_path / f"cache/models--first--one/blobs/{SHA256}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1_500_000])  # as an earlier process leaves it
    code = (
        "import ldm.loading.published as p, pathlib, sys; p.TABLE = pathlib.Path(sys.argv[1]);"
        "print(p.download('small'))"
    )
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": constants.ENDPOINT}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, tmp_path / "table.csv"]
    env = {**os.environ, **environment}
    result = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).read_bytes() == CONTENT
    assert hub.gets == [("first/one/a.safetensors", "bytes=1500000-")]
    assert not part.exists()


def test_what_arrived_before_a_cut_is_kept_and_only_the_rest_is_fetched(
    hub, table, tmp_path, monkeypatch
):
    table(SHA256)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.files["first/one/a.safetensors"] = CONTENT
    hub.sent = 1_000_000
    assert main(["small"]) == 0
    assert [words for _, words in hub.gets] == [None, "bytes=1000000-"]
    assert final_files(tmp_path)[0].read_bytes() == CONTENT


def test_a_damaged_partial_file_is_fetched_again(hub, table, tmp_path):
    table(SHA256)
    hub.files["first/one/a.safetensors"] = CONTENT
    part = tmp_path / f"cache/models--first--one/blobs/{SHA256}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    assert main(["small"]) == 0
    assert final_files(tmp_path)[0].read_bytes() == CONTENT


WRONG = CONTENT[:-1] + b"x"


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ((401, "RepoNotFound"), "is gone or private"),
        ((401, ""), "is gone or private"),
        ((403, "GatedRepo"), "is gated: accept its licence"),
        ((404, "EntryNotFound"), "does not have this file"),
        ((403, ""), "the server says 403"),
        (WRONG, "is another file: its SHA-256 is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_next_place_is_tried(hub, table, tmp_path, capsys, first, reason):
    table(SHA256)
    hub.files |= {"first/one/a.safetensors": first, "second/two/b.ckpt": CONTENT}
    assert main(["small"]) == 0
    out, err = capsys.readouterr()
    assert reason in err
    assert "log in" not in err.lower()
    assert [Path(out.strip())] == final_files(tmp_path)
    assert [name for name, _ in hub.gets] == ["second/two/b.ckpt"]


def test_content_that_is_not_what_the_hub_promised_is_thrown_away(hub, table, tmp_path, capsys):
    table(SHA256)
    hub.files["first/one/a.safetensors"] = WRONG
    hub.etags["first/one/a.safetensors"] = SHA256
    assert main(["small"]) == 1
    *_, first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("`first/one/a.safetensors` is another file: its SHA-256 is ")
    assert second == "`second/two` is gone or private"
    assert "error: none of its 2 places gives small" in last
    assert list((tmp_path / "cache").rglob("*.incomplete")) == []
    assert final_files(tmp_path) == []


def test_a_full_disk_and_a_missing_network_end_it_in_one_line(
    hub, table, tmp_path, capsys, monkeypatch
):
    table(SHA256)
    hub.files["first/one/a.safetensors"] = CONTENT
    usage = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["small"]) == 1
    assert "error: the disk is full: 0.00 GB are needed" in capsys.readouterr().err.splitlines()[-1]
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert main(["small"]) == 1
    assert "error: no connection to http://127.0.0.1:9" in capsys.readouterr().err.splitlines()[-1]
    error = OfflineModeIsEnabled("HF_HUB_OFFLINE=1")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", Mock(side_effect=error))
    assert main(["small"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err.splitlines()[-1]
    assert final_files(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_disk_that_fills_up_meanwhile_is_named(hub, table, tmp_path, capsys):
    table(SHA256)
    hub.files["first/one/a.safetensors"] = CONTENT
    part = tmp_path / f"cache/models--first--one/blobs/{SHA256}.incomplete"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    assert main(["small"]) == 1
    assert "error: the disk is full: `" in capsys.readouterr().err.splitlines()[-1]
    assert final_files(tmp_path) == []


def test_a_row_without_a_hash_is_unverified_and_its_first_hash_kept(hub, table, tmp_path, capsys):
    table("")
    hub.files["first/one/a.safetensors"] = CONTENT
    assert main(["small"]) == 0
    assert f"SHA-256 {SHA256}; none was published" in capsys.readouterr().err
    assert main([]) == 0
    assert f"(unverified {SHA256})" in capsys.readouterr().out
    final_files(tmp_path)[0].unlink()
    hub.files["first/one/a.safetensors"] = WRONG
    assert main(["small"]) == 1
    assert (
        f"is another file: its SHA-256 is {hashlib.sha256(WRONG).hexdigest()}, not {SHA256}"
        in capsys.readouterr().err
    )


def test_a_changed_file_in_the_cache_is_not_taken_for_the_published_one(hub, table, tmp_path):
    table(SHA256)
    hub.files["first/one/a.safetensors"] = CONTENT
    assert main(["small"]) == 0
    final_files(tmp_path)[0].write_bytes(WRONG)
    with pytest.raises(FileNotFoundError, match="is not on this machine"):
        find_checkpoint("small")
    assert main(["small"]) == 0
    assert find_checkpoint("small").read_bytes() == CONTENT


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, table, monkeypatch):
    table(SHA256)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files["first/one/a.safetensors"] = hub.files["in/storage/x"] = CONTENT
    hub.locations["first/one/a.safetensors"] = "in/storage/x"
    assert main(["small"]) == 0
    tokens = [(name, token) for _, name, _, token in hub.requests]
    assert tokens == [("first/one/a.safetensors", "Bearer hf_secret"), ("in/storage/x", None)]


def test_everything_knows_a_downloaded_file_and_nothing_else_connects(
    hub, table, tmp_path, capsys, monkeypatch
):
    table(hashlib.sha256(DEMO.read_bytes()).hexdigest())
    hub.files["first/one/a.safetensors"] = DEMO.read_bytes()
    assert main(["small"]) == 0
    path = capsys.readouterr().out.strip()
    connections = []
    monkeypatch.setattr("socket.socket.connect", lambda self, address: connections.append(address))
    monkeypatch.setattr("socket.getaddrinfo", lambda *names, **_: connections.append(names))

    assert ldm_main(["inspect-checkpoint", "small", "--no-probe"]) == 0
    assert "published   small, Small (SHA-256 " in capsys.readouterr().out
    words = "--steps 1 --n_samples 1 --n_iter 1 --skip_grid --prompt x --precision full --outdir"
    assert ldm_main(["txt2img", "--ckpt", "small", *words.split(), str(tmp_path / "out")]) == 0
    assert "checkpoint: small, Small (by its SHA-256)" in capsys.readouterr().err
    assert ldm_main(["replay", str(tmp_path / "out/samples/00000.png")]) == 0
    assert ldm_main(["convert", "small", str(tmp_path / "folder"), "--vae", "small"]) == 0
    assert ldm_main(["txt2img", "--ckpt", "smal", *words.split(), str(tmp_path)]) == 1
    assert "did you mean `small`?" in capsys.readouterr().err
    model = load(ckpt="small")
    assert load_initial_weights(model, {"ckpt_path": "small"})
    (tmp_path / "models").mkdir()
    assert str(read_catalogue(tmp_path / "models").models["a.safetensors"].path) == path
    assert connections == []


def test_an_address_is_a_file_or_a_diffusers_folder(hub, tmp_path):
    index = {"_class_name": "P", "unet": ["diffusers", "U"], "safety_checker": ["a", "B"]}
    inside = {"model_index.json": json.dumps(index).encode(), "unet/config.json": b"{}"}
    weights = "diffusion_pytorch_model"
    inside |= {
        f"unet/{weights}{end}": b"w" for end in (".safetensors", ".fp16.safetensors", ".bin")
    }
    inside |= {"safety_checker/model.safetensors": b"s", "v1.ckpt": CONTENT}
    hub.files |= {f"some/pipe/{name}": content for name, content in inside.items()}
    folder = find_checkpoint("hf:some/pipe")
    names = sorted(path.relative_to(folder).as_posix() for path in final_files(tmp_path))
    assert names == ["model_index.json", "unet/config.json", f"unet/{weights}.safetensors"]
    assert find_checkpoint("hf:some/pipe/v1.ckpt").read_bytes() == CONTENT
    count = len(hub.requests)
    assert find_checkpoint("hf:some/pipe") == folder
    assert find_checkpoint("hf:some/pipe/v1.ckpt", fetch=False).name == "v1.ckpt"
    assert len(hub.requests) == count
    with pytest.raises(OSError, match="has no file `v2.ckpt`; it has unet/"):
        find_checkpoint("hf:some/pipe/v2.ckpt")
    with pytest.raises(FileNotFoundError, match="machine: ldm download hf:some/other"):
        find_checkpoint("hf:some/other", fetch=False)
