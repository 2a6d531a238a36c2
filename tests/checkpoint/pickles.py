"""Build pickles and torch files by hand, as an attacker would."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any


class Raw:
    """Pickle operations that are inserted unchanged."""

    def __init__(self, code: bytes) -> None:
        self.code = code


def name(path: str) -> Raw:
    """Return the operation that refers to a class or function."""
    module, _, attribute = path.rpartition(".")
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(function: str | Raw, *args: Any) -> Raw:
    """Return operations that call a function when Python's unpickler executes them."""
    maker = name(function) if isinstance(function, str) else function
    return Raw(maker.code + encode(args) + b"R")


def new(cls: str, *args: Any) -> Raw:
    """Return operations that create an object with ``__new__``."""
    return Raw(name(cls).code + encode(args) + b"\x81")


def build(target: Raw, state: Any) -> Raw:
    """Return operations that set the state of an object, with ``__setstate__`` if it is defined."""
    return Raw(target.code + encode(state) + b"b")


def storage(key: Any, numel: Any, kind: str = "torch.FloatStorage") -> Raw:
    """Return a reference to the storage of a tensor."""
    return Raw(encode(("storage", name(kind), key, "cpu", numel)) + b"Q")


def tensor(offset: Any = 0, size: Any = (2,), stride: Any = (1,), *, key: Any = "0", numel: Any = 2) -> Raw:
    """Return a float tensor over the storage ``key``."""
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage(key, numel), offset, size, stride, False, hooks)


def encode(value: Any) -> bytes:
    """Return the operations that push a value."""
    if isinstance(value, Raw):
        return value.code
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        octets = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8b" + struct.pack("<i", len(octets)) + octets
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    assert isinstance(value, dict)
    return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"


def pickle_of(value: Any) -> bytes:
    """Return a complete pickle of protocol 2."""
    return b"\x80\x02" + encode(value) + b"."


def write(path: Path, root: Any, data: dict[str, bytes] | None = None, extra: dict[str, bytes] | None = None) -> Path:
    """Write a file in torch's zip format with this pickle; by default, storage "0" contains the floats 1 and 2."""
    data = {"0": struct.pack("<2f", 1, 2)} if data is None else data
    pickled = root if isinstance(root, bytes) else pickle_of(root)
    records = {
        "data.pkl": pickled,
        "version": b"3\n",
        **{f"data/{key}": value for key, value in data.items()},
        **(extra or {}),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in records.items():
            archive.writestr(f"archive/{key}", value)
    return path


def overlapping(path: Path, root: Any, copies: int, length: int) -> Path:
    """Write a zip file whose directory lists the bytes of one record ``copies`` times."""
    memory = bytes(length)
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(memory), length, length, 14, 0)
    body = header + b"archive/data/0" + memory
    pickled = pickle_of(root)
    entries = []

    def entry(label: bytes, content: bytes, offset: int) -> bytes:
        numbers = (
            20,
            20,
            0,
            0,
            0,
            33,
            zlib.crc32(content),
            len(content),
            len(content),
            len(label),
            0,
            0,
            0,
            0,
            0,
            offset,
        )
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers) + label

    entries += [entry(f"archive/data/{index}".encode(), memory, 0) for index in range(copies)]
    at = len(body)
    label = b"archive/data.pkl"
    body += struct.pack(
        "<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(pickled), len(pickled), len(pickled), len(label), 0
    )
    body += label + pickled
    entries.append(entry(label, pickled, at))
    directory = b"".join(entries)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    path.write_bytes(body + directory + end)
    return path
