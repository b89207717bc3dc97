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


def push_text(value: str) -> bytes:
    write_bytes = value.encode()
    return b"X" + struct.pack("<I", len(write_bytes)) + write_bytes


def push_call(name: str, *arguments: str) -> bytes:
    """GLOBAL name, arguments as a tuple, REDUCE."""
    module, _, attribute = name.rpartition(".")
    pushed = b"".join(push_text(value) for value in arguments)
    return f"c{module}\n{attribute}\n".encode() + b"(" + pushed + b"tR"


def make_pickle(body: bytes, protocol: int = 2) -> bytes:
    """A pickle of {"state_dict": {}, "x": body}."""
    head = b"\x80" + bytes([protocol]) + b"}("
    return head + push_text("state_dict") + b"}" + push_text("x") + body + b"u."


def write_zip(
    path: Path, data: bytes, extra: dict[str, bytes] | None = None, deflate=False
) -> Path:
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    members = {"archive/data.pkl": data, "archive/version": b"3\n", "archive/byteorder": b"little"}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in {**members, **(extra or {})}.items():
            archive.writestr(name, content)
    return path


def write_torchscript(path: Path, data: bytes) -> Path:
    """An archive of TorchScript."""
    code = {"archive/constants.pkl": b"\x80\x02).", "archive/code/__torch__.py": b"exit()"}
    return write_zip(path, data, code)


def write_legacy(path: Path, data: bytes) -> Path:
    parts = [MAGIC_NUMBER, PROTOCOL_VERSION, SYSTEM]
    path.write_bytes(b"".join(pickle.dumps(p, 2) for p in parts) + data + pickle.dumps([], 2))
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def make_calls(marker: Path) -> dict[str, bytes]:
    """Calls that attackers make, by the name that an error message should give."""
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
    popen = b"csubprocess\nPopen\n((" + push_text("touch") + push_text(str(marker)) + b"ltR"
    return {name: push_call(name, *args) for name, args in arguments.items()} | {
        "subprocess.Popen": popen
    }


def make_indirect_calls(marker: Path) -> dict[str, bytes]:
    """Other ways to reach a function."""
    touch = push_text(f"touch {marker}")
    nested = make_pickle(push_call("os.system", f"touch {marker}"))
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
        "persistent-id-tuple": push_text("module") + system + b"\x86Q",
        "nested-pickle": b"cpickle\nloads\n(" + blob + b"tR",
        "build-setstate": b"ctorch.nn.modules.module\nModule\n)\x81}(" + touch + system + b"ub",
        "build-on-stand-in": b"cnumpy\ndtype\n)R" + system + b"(" + touch + b"tRb",
        "partial": b"cfunctools\npartial\n(" + system + touch + b"tR)R",
        "getattr": b"c__builtin__\ngetattr\n(cos\n__dict__\n" + push_text("system") + b"tR",
        "append-to-object": b"ccollections\ndeque\n)R" + touch + b"a" + system + b"0",
        "reduce-on-result": push_call("collections.OrderedDict")
        + b"0"
        + system
        + b"("
        + touch
        + b"tR",
        "attribute-of-stand-in": b"cnumpy\ndtype.__class__.__base__\n)R",
        "codecs": b"c_codecs\nlookup\n(" + push_text("rot13") + b"tR",
    }


def write_damaged_files(folder: Path, marker: Path) -> dict[str, Path]:
    """Files that are wrong before any pickle is read."""
    evil = make_pickle(push_call("os.system", f"touch {marker}"))
    good = make_pickle(b"}")
    page = b"<!DOCTYPE html><html><body>404</body></html>"
    complete = write_zip(folder / "whole.ckpt", evil).read_bytes()
    damaged = bytearray(write_zip(folder / "flags.ckpt", evil).read_bytes())
    damaged[6] |= 1  # says that the first member is encrypted
    return {
        "second data.pkl": write_zip(folder / "2.ckpt", good, {"other/data.pkl": evil}),
        "same data.pkl twice": _write_member_twice(folder / "3.ckpt", good, evil),
        "code member": write_zip(folder / "4.ckpt", good, {"archive/code/__torch__.py": b"x"}),
        "member outside": write_zip(folder / "5.ckpt", good, {"../../evil.py": b"x"}),
        "deflated": write_zip(folder / "6.ckpt", good, {"archive/data/0": bytes(1 << 20)}, True),
        "named .safetensors": write_zip(folder / "7.safetensors", evil),
        "truncated": write_bytes(folder / "8.ckpt", complete[: len(complete) // 2]),
        "flags": write_bytes(folder / "9.ckpt", bytes(damaged)),
        "empty": write_bytes(folder / "10.ckpt", b""),
        "web page": write_bytes(folder / "11.ckpt", page),
        "seven zip": write_bytes(folder / "12.ckpt", b"7z\xbc\xaf\x27\x1c" + bytes(100)),
        "tar": write_bytes(folder / "13.ckpt", bytes(257) + b"ustar" + bytes(300)),
        "lfs pointer": write_bytes(
            folder / "14.ckpt", b"version https://git-lfs.github.com/spec/v1\n"
        ),
        "text pickle": write_bytes(folder / "15.ckpt", pickle.dumps({"a": 1}, 0)),
    }


def _write_member_twice(path: Path, first: bytes, second: bytes) -> Path:
    """Write two members with names of equal length, then rename one over the other."""
    write_zip(path, first, {"archive/dat2.pkl": second})
    path.write_bytes(path.read_bytes().replace(b"archive/dat2.pkl", b"archive/data.pkl"))
    return path


def write_all(folder: Path, marker: Path) -> dict[str, Path]:
    files = write_damaged_files(folder, marker)
    for name, body in make_calls(marker).items():
        for envelope in (write_zip, write_legacy, write_torchscript, write_bytes):
            path = folder / f"{name}-{envelope.__name__}.ckpt"
            files[f"{envelope.__name__} {name}"] = envelope(path, make_pickle(body))
    for name, body in make_indirect_calls(marker).items():
        protocol = 4 if body[:1] == b"\x8c" or name == "newobj-ex" else 2
        for envelope in (write_zip, write_legacy):
            path = folder / f"{name}-{envelope.__name__}.ckpt"
            files[f"{envelope.__name__} {name}"] = envelope(path, make_pickle(body, protocol))
    return files
