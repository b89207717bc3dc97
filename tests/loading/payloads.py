"""Malicious checkpoints, written byte by byte: each would create `marker` if its code were run.

`write_malicious_files(folder, marker)` returns files by name: calls of functions that attackers
use, by REDUCE, in four formats (zip, legacy pickle, TorchScript, bare pickle); calls by other
opcodes; and damaged files.
"""

import pickle
import struct
import zipfile
from pathlib import Path

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4}}


def push_text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def push_call(name: str, *arguments: str) -> bytes:
    """Return the opcodes GLOBAL name, arguments as a tuple, REDUCE."""
    module, _, attribute = name.rpartition(".")
    pushed = b"".join(push_text(value) for value in arguments)
    return f"c{module}\n{attribute}\n".encode() + b"(" + pushed + b"tR"


def make_pickle(body: bytes, protocol: int = 2) -> bytes:
    """Make a pickle of {"state_dict": {}, "x": body}."""
    header = b"\x80" + bytes([protocol]) + b"}("
    return header + push_text("state_dict") + b"}" + push_text("x") + body + b"u."


def write_zip(
    path: Path, data: bytes, other_members: dict[str, bytes] | None = None, compress=False
) -> Path:
    compression = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    members = {"archive/data.pkl": data, "archive/version": b"3\n", "archive/byteorder": b"little"}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**members, **(other_members or {})}.items():
            archive.writestr(name, content)
    return path


def write_torchscript(path: Path, data: bytes) -> Path:
    code = {"archive/constants.pkl": b"\x80\x02).", "archive/code/__torch__.py": b"exit()"}
    return write_zip(path, data, code)


def write_legacy(path: Path, data: bytes) -> Path:
    header = [MAGIC_NUMBER, PROTOCOL_VERSION, SYSTEM]
    pickled = [pickle.dumps(value, 2) for value in header]
    path.write_bytes(b"".join(pickled) + data + pickle.dumps([], 2))
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def make_calls(marker: Path) -> dict[str, bytes]:
    """Make calls that attackers use, by the name that the error message should give."""
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
    """Make calls by other opcodes."""
    touch = push_text(f"touch {marker}")
    nested = make_pickle(push_call("os.system", f"touch {marker}"))
    blob = b"B" + struct.pack("<I", len(nested)) + nested
    system = b"cos\nsystem\n"
    call = system + b"(" + touch + b"tR"
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
        "build-on-stand-in": b"cnumpy\ndtype\n)R" + call + b"b",
        "partial": b"cfunctools\npartial\n(" + system + touch + b"tR)R",
        "getattr": b"c__builtin__\ngetattr\n(cos\n__dict__\n" + push_text("system") + b"tR",
        "append-to-object": b"ccollections\ndeque\n)R" + touch + b"a" + system + b"0",
        "reduce-on-result": push_call("collections.OrderedDict") + b"0" + call,
        "attribute-of-stand-in": b"cnumpy\ndtype.__class__.__base__\n)R",
        "codecs": b"c_codecs\nlookup\n(" + push_text("rot13") + b"tR",
    }


def write_damaged_files(folder: Path, marker: Path) -> dict[str, Path]:
    """Write files that are refused before their pickle is read."""
    malicious = make_pickle(push_call("os.system", f"touch {marker}"))
    harmless = make_pickle(b"}")
    web_page = b"<!DOCTYPE html><html><body>404</body></html>"
    complete = write_zip(folder / "whole.ckpt", malicious).read_bytes()
    damaged = bytearray(write_zip(folder / "flags.ckpt", malicious).read_bytes())
    damaged[6] |= 1  # says that the first member is encrypted
    return {
        "second data.pkl": write_zip(folder / "2.ckpt", harmless, {"other/data.pkl": malicious}),
        "same data.pkl twice": _write_member_twice(folder / "3.ckpt", harmless, malicious),
        "code member": write_zip(folder / "4.ckpt", harmless, {"archive/code/__torch__.py": b"x"}),
        "member outside": write_zip(folder / "5.ckpt", harmless, {"../../evil.py": b"x"}),
        "deflated": write_zip(folder / "6.ckpt", harmless, {"archive/data/0": bytes(10**6)}, True),
        "named .safetensors": write_zip(folder / "7.safetensors", malicious),
        "truncated": write_bytes(folder / "8.ckpt", complete[: len(complete) // 2]),
        "flags": write_bytes(folder / "9.ckpt", bytes(damaged)),
        "empty": write_bytes(folder / "10.ckpt", b""),
        "web page": write_bytes(folder / "11.ckpt", web_page),
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


def write_malicious_files(folder: Path, marker: Path) -> dict[str, Path]:
    files = write_damaged_files(folder, marker)
    for name, body in make_calls(marker).items():
        for write in (write_zip, write_legacy, write_torchscript, write_bytes):
            path = folder / f"{name}-{write.__name__}.ckpt"
            files[f"{write.__name__} {name}"] = write(path, make_pickle(body))
    for name, body in make_indirect_calls(marker).items():
        protocol = 4 if body[:1] == b"\x8c" or name == "newobj-ex" else 2
        for write in (write_zip, write_legacy):
            path = folder / f"{name}-{write.__name__}.ckpt"
            files[f"{write.__name__} {name}"] = write(path, make_pickle(body, protocol))
    return files
