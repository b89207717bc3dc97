"""Malicious checkpoints, written byte by byte: each would create `marker` if its code were run.

`write_all(folder, marker)` returns files by name: calls of functions that attackers use, each by
REDUCE, in four formats (zip, the older pickle, TorchScript, a bare pickle); other opcodes that
call; and files whose container is damaged.
"""

import pickle
import struct
import zipfile
from pathlib import Path

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4}}


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(name: str, *arguments: str) -> bytes:
    """GLOBAL name, arguments as a tuple, REDUCE."""
    module, _, attribute = name.rpartition(".")
    pushed = b"".join(text(value) for value in arguments)
    return f"c{module}\n{attribute}\n".encode() + b"(" + pushed + b"tR"


def document(body: bytes, protocol: int = 2) -> bytes:
    """A pickle of {"state_dict": {}, "x": body}."""
    head = b"\x80" + bytes([protocol]) + b"}("
    return head + text("state_dict") + b"}" + text("x") + body + b"u."


def zipped(path: Path, data: bytes, extra: dict[str, bytes] | None = None, deflate=False) -> Path:
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    members = {"archive/data.pkl": data, "archive/version": b"3\n", "archive/byteorder": b"little"}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in {**members, **(extra or {})}.items():
            archive.writestr(name, content)
    return path


def write_torchscript(path: Path, data: bytes) -> Path:
    """An archive of TorchScript."""
    code = {"archive/constants.pkl": b"\x80\x02).", "archive/code/__torch__.py": b"exit()"}
    return zipped(path, data, code)


def legacy(path: Path, data: bytes) -> Path:
    parts = [MAGIC_NUMBER, PROTOCOL_VERSION, SYSTEM]
    path.write_bytes(b"".join(pickle.dumps(p, 2) for p in parts) + data + pickle.dumps([], 2))
    return path


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def calls(marker: Path) -> dict[str, bytes]:
    """What attackers call, by the name that an error message should give."""
    touch = f"touch {marker}"
    statement = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    arguments = {
        "builtins.open": (str(marker), "w"),
        "builtins.__import__": ("antigravity",),
        "importlib.import_module": ("antigravity",),
        "pathlib.Path.touch": (str(marker),),
        "shutil.copy": ("/etc/hostname", str(marker)),
        "torch.hub.load": ("a/b", "c"),
        "torch.utils.cpp_extension.load_inline": ("x", "int main(){}"),
        "torch.load": (str(marker),),
        "numpy.load": (str(marker),),
        "ctypes.CDLL": ("libc.so.6",),
        "webbrowser.open": ("http://127.0.0.1:9/",),
        "socket.create_connection": ("127.0.0.1",),
    }
    for name in ("os.system", "posix.system", "os.popen", "subprocess.getoutput",
                 "logging.os.system", "torch.serialization.os.system"):  # fmt: skip
        arguments[name] = (touch,)
    for name in ("builtins.eval", "builtins.exec", "__builtin__.eval", "runpy._run_code",
                 "timeit.timeit", "pdb.run"):  # fmt: skip
        arguments[name] = (statement,)
    popen = b"csubprocess\nPopen\n((" + text("touch") + text(str(marker)) + b"ltR"
    return {name: call(name, *args) for name, args in arguments.items()} | {
        "subprocess.Popen": popen
    }


def tricks(marker: Path) -> dict[str, bytes]:
    """Other ways to reach a function."""
    touch = text(f"touch {marker}")
    nested = document(call("os.system", f"touch {marker}"))
    blob = b"B" + struct.pack("<I", len(nested)) + nested
    system = b"cos\nsystem\n"
    return {
        "inst": b"(" + touch + b"ios\nsystem\n",
        "obj": b"(" + system + touch + b"o",
        "newobj": system + b"(" + touch + b"t\x81",
        "newobj-ex": system + b"(" + touch + b"t}\x92",
        "stack-global": b"\x8c\x02os\x8c\x06system\x93(" + touch + b"tR",
        "stack-global-memo": b"\x8c\x02os\x94\x8c\x06system\x94\x93(" + touch + b"tR",
        "extension": b"\x82\x01(" + touch + b"tR",
        "persistent-id": b"P" + b"os.system\n",
        "persistent-id-tuple": text("module") + system + b"\x86Q",
        "nested-pickle": b"cpickle\nloads\n(" + blob + b"tR",
        "build-setstate": b"ctorch.nn.modules.module\nModule\n)\x81}(" + touch + system + b"ub",
        "build-on-stand-in": b"cnumpy\ndtype\n)R" + system + b"(" + touch + b"tRb",
        "partial": b"cfunctools\npartial\n(" + system + touch + b"tR)R",
        "getattr": b"c__builtin__\ngetattr\n(cos\n__dict__\n" + text("system") + b"tR",
        "append-to-object": b"ccollections\ndeque\n)R" + touch + b"a" + system + b"0",
        "reduce-on-result": call("collections.OrderedDict") + b"0" + system + b"(" + touch + b"tR",
        "attribute-of-stand-in": b"cnumpy\ndtype.__class__.__base__\n)R",
        "codecs": b"c_codecs\nlookup\n(" + text("rot13") + b"tR",
    }


def containers(folder: Path, marker: Path) -> dict[str, Path]:
    """Files that are wrong before any pickle is read."""
    evil = document(call("os.system", f"touch {marker}"))
    good = document(b"}")
    page = b"<!DOCTYPE html><html><body>404</body></html>"
    whole = zipped(folder / "whole.ckpt", evil).read_bytes()
    damaged = bytearray(zipped(folder / "flags.ckpt", evil).read_bytes())
    damaged[6] |= 1  # says that the first member is encrypted
    return {
        "second data.pkl": zipped(folder / "2.ckpt", good, {"other/data.pkl": evil}),
        "same data.pkl twice": _twice(folder / "3.ckpt", good, evil),
        "code member": zipped(folder / "4.ckpt", good, {"archive/code/__torch__.py": b"x"}),
        "member outside": zipped(folder / "5.ckpt", good, {"../../evil.py": b"x"}),
        "deflated": zipped(folder / "6.ckpt", good, {"archive/data/0": bytes(1 << 20)}, True),
        "named .safetensors": zipped(folder / "7.safetensors", evil),
        "truncated": raw(folder / "8.ckpt", whole[: len(whole) // 2]),
        "flags": raw(folder / "9.ckpt", bytes(damaged)),
        "empty": raw(folder / "10.ckpt", b""),
        "web page": raw(folder / "11.ckpt", page),
        "seven zip": raw(folder / "12.ckpt", b"7z\xbc\xaf\x27\x1c" + bytes(100)),
        "tar": raw(folder / "13.ckpt", bytes(257) + b"ustar" + bytes(300)),
        "lfs pointer": raw(folder / "14.ckpt", b"version https://git-lfs.github.com/spec/v1\n"),
        "text pickle": raw(folder / "15.ckpt", pickle.dumps({"a": 1}, 0)),
    }


def _twice(path: Path, first: bytes, second: bytes) -> Path:
    """Two members of the same length of name, then one renamed over the other."""
    zipped(path, first, {"archive/dat2.pkl": second})
    path.write_bytes(path.read_bytes().replace(b"archive/dat2.pkl", b"archive/data.pkl"))
    return path


def write_all(folder: Path, marker: Path) -> dict[str, Path]:
    files = containers(folder, marker)
    for name, body in calls(marker).items():
        for envelope in (zipped, legacy, write_torchscript, raw):
            path = folder / f"{name}-{envelope.__name__}.ckpt"
            files[f"{envelope.__name__} {name}"] = envelope(path, document(body))
    for name, body in tricks(marker).items():
        protocol = 4 if body[:1] in (b"\x8c",) or name == "newobj-ex" else 2
        for envelope in (zipped, legacy):
            path = folder / f"{name}-{envelope.__name__}.ckpt"
            files[f"{envelope.__name__} {name}"] = envelope(path, document(body, protocol))
    return files
