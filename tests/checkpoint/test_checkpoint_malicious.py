"""Malicious checkpoint directories with valid digests."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from stratagem.checkpoint import DirectoryFormat
from stratagem.errors import CheckpointError
from tests.support.manifests import seal

FORMAT = DirectoryFormat()
Manifest = dict[str, Any]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A checkpoint to modify."""
    path = tmp_path / "epoch_1"
    FORMAT.save({"meta": {"iter": 1}, "state_dict": {"a": torch.arange(4.0), "b": torch.arange(4.0)}}, path)
    return path


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace the content of a file and update the manifest."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    if name == "state.json":
        manifest["files"][name] = {"bytes": len(data), "digest": blake3(data).hexdigest()}
    else:
        size = 8 + int.from_bytes(data[:8], "little")
        digest = blake3(data[:size]).hexdigest()
        manifest["files"][name] = {"bytes": len(data), "header": {"bytes": size, "digest": digest}}
    seal(path, manifest)


def with_header(path: Path, change: Callable[[dict[str, Any]], object] | bytes) -> None:
    """Replace the header of the model file by one of the same length, or by the given bytes."""
    data = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = (
        change if isinstance(change, bytes) else (change(header), json.dumps(header, separators=(",", ":")).encode())[1]
    )
    text = text.ljust(size)
    rewrite(path, "model.safetensors", len(text).to_bytes(8, "little") + text + data[8 + size :])


def with_manifest(path: Path, change: Callable[[Manifest], object]) -> None:
    """Modify the manifest and update its digest."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    seal(path, manifest)


def huge_header(path: Path) -> None:
    """Declare a header that is larger than any memory."""
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    with_manifest(path, lambda m: m["files"]["model.safetensors"]["header"].update(bytes=1 << 62))


def sparse(name: str) -> Callable[[Path], None]:
    """Return a function that makes a file one tebibyte long without using disk space."""

    def grow(path: Path) -> None:
        with (path / name).open("r+b") as file:
            file.truncate(1 << 40)
        if name != "manifest.json":
            with_manifest(path, lambda m: m["files"][name].update(bytes=1 << 40))

    return grow


def box(number: int, start: list[Any], shape: list[Any]) -> Callable[[Path], None]:
    """Return a function that replaces a box of the tensor ``a`` in the manifest."""

    def change(manifest: Manifest) -> None:
        manifest["tensors"]["state_dict"]["a"]["pieces"][number:] = [[start, shape, "0" * 64]]

    return lambda path: with_manifest(path, change)


def offsets(begin: Any, end: Any) -> Callable[[Path], None]:
    """Return a function that changes the offsets of the tensor ``a`` in the file."""
    return lambda path: with_header(path, lambda header: header["a"].update(data_offsets=[begin, end]))


def another_shape(*shape: Any) -> Callable[[Path], None]:
    """Return a function that changes the shape of the tensor ``a`` in header and manifest."""

    def change(path: Path) -> None:
        with_header(path, lambda header: header["a"].update(shape=list(shape)))
        with_manifest(path, lambda m: m["tensors"]["state_dict"]["a"].update(shape=list(shape)))

    return change


def parts(names: dict[str, Any]) -> Callable[[Path], None]:
    """Return a function that replaces the description of the state tree."""
    return lambda path: rewrite(path, "state.json", json.dumps(names).encode())


CORPUS: dict[str, Callable[[Path], None]] = {
    "a header longer than the file": huge_header,
    "a header of a tebibyte": sparse("model.safetensors"),
    "a manifest of a tebibyte": sparse("manifest.json"),
    "a state of a tebibyte": sparse("state.json"),
    "a negative offset": offsets(-16, 0),
    "an offset beyond the end": offsets(1 << 40, (1 << 40) + 16),
    "an offset that is not a number": offsets("0", "16"),
    "overlapping tensors": offsets(16, 32),
    "half-overlapping tensors": offsets(8, 24),
    "a gap": lambda path: with_header(path, lambda header: header.pop("b")),
    "an end before the start": offsets(16, 0),
    "a negative size": another_shape(-4),
    "sizes whose product wraps around": another_shape(1 << 32, 1 << 32),
    "a size that is not a number": another_shape("4"),
    "a size that is a fraction": another_shape(4.0),
    "an unknown dtype": lambda path: with_header(path, lambda header: header["a"].update(dtype="O8")),
    "a tensor named twice": lambda path: with_header(
        path,
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
    ),
    "a deep header": lambda path: with_header(path, b"[" * 100_000),
    "a header that is a list": lambda path: with_header(path, b"[]"),
    "a header that is not text": lambda path: with_header(path, b"\xff" * 8),
    "a deep state": lambda path: rewrite(path, "state.json", b'{"a":' * 100_000),
    "a state named twice": lambda path: rewrite(path, "state.json", b'{"meta":1,"meta":2}'),
    "a state that is a list": lambda path: rewrite(path, "state.json", b"[]"),
    "a number that is not valid JSON": lambda path: rewrite(path, "state.json", b'{"meta":NaN}'),
    "a number with too many digits": lambda path: rewrite(path, "state.json", b'{"meta":' + b"9" * 100_000 + b"}"),
    "a float that is a list": parts({"meta": {"$float": []}}),
    "a float too large": parts({"meta": {"$float": 10**400}}),
    "a set of lists": parts({"meta": {"$set": [[]]}}),
    "a key that is a list": parts({"meta": {"$items": [[[], 1]]}}),
    "items that are not pairs": parts({"meta": {"$items": [1]}}),
    "versions of nothing": parts({"meta": {"$versioned": 1}}),
    "versions that are not a dict": parts({"meta": {"$versioned": [1, 2]}}),
    "a missing tensor": parts({"state_dict": {"$tensor": "c"}}),
    "a tensor whose name is a list": parts({"state_dict": {"$tensor": []}}),
    "a path as a file": lambda path: with_manifest(path, lambda m: m["files"].update({"../x": {"bytes": 1}})),
    "an absolute path as a file": lambda path: with_manifest(
        path, lambda m: m["files"].update({"/etc/passwd": {"bytes": 1}})
    ),
    "a path as a part": lambda path: with_manifest(path, lambda m: m["tensors"].update({"../x": {}})),
    "a part without a file": lambda path: with_manifest(path, lambda m: m["tensors"].update(more={})),
    "a file of a negative size": lambda path: with_manifest(path, lambda m: m["files"]["state.json"].update(bytes=-1)),
    "a size that is True": lambda path: with_manifest(path, lambda m: m["files"]["state.json"].update(bytes=True)),
    "a file without a digest": lambda path: with_manifest(path, lambda m: m["files"]["state.json"].pop("digest")),
    "a part that is a list": lambda path: with_manifest(path, lambda m: m["tensors"].update(state_dict=[])),
    "a tensor that is a list": lambda path: with_manifest(path, lambda m: m["tensors"]["state_dict"].update(a=[])),
    "a tensor without a list of boxes": lambda path: with_manifest(
        path, lambda m: m["tensors"]["state_dict"]["a"].pop("pieces")
    ),
    "no boxes": lambda path: with_manifest(path, lambda m: m["tensors"]["state_dict"]["a"].update(pieces=[])),
    "half of the boxes": box(0, [0], [2]),
    "a duplicate box": box(1, [0], [4]),
    "a box outside the tensor": box(0, [1], [4]),
    "a negative box": box(0, [-1], [4]),
    "a box with other dimensions": box(0, [0, 0], [2, 2]),
    "a huge box": box(0, [0], [1 << 62]),
    "a box of strings": box(0, ["0"], ["4"]),
}


@pytest.mark.parametrize("harm", CORPUS.values(), ids=CORPUS.keys())
def test_a_malicious_checkpoint_is_rejected(made: Path, harm: Callable[[Path], None]) -> None:
    """A malicious checkpoint raises a CheckpointError, touches no other file and cannot exhaust the memory."""
    harm(made)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            FORMAT.load(made)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_an_unchanged_rewrite_can_be_loaded(made: Path) -> None:
    """A checkpoint rewritten without a change can be loaded, so these tests do produce valid digests."""
    rewrite(made, "state.json", (made / "state.json").read_bytes())
    with_header(made, lambda header: header)
    with_manifest(made, lambda manifest: manifest)
    assert FORMAT.load(made)["state_dict"]["a"].tolist() == [0, 1, 2, 3]


def test_a_part_name_cannot_lead_outside_the_directory(made: Path, tmp_path: Path) -> None:
    """Even without verification, a part named like a path reads nothing outside the directory."""
    (tmp_path / "secret.safetensors").write_bytes((made / "model.safetensors").read_bytes())
    parts({"../secret": {"$tensor": "a"}})(made)
    with pytest.raises(CheckpointError, match="missing"):
        FORMAT.load(made, verify=False)
