"""Malicious files: no code from them is executed, and memory stays bounded."""

from __future__ import annotations

import builtins
import importlib
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stratagem.checkpoint import CheckpointLoader, SingleFileFormat, flatten_tree
from stratagem.checkpoint.restricted_unpickler import ValueBuilder, read_pickle
from stratagem.errors import CheckpointDamagedError, CheckpointError
from tests.checkpoint.pickles import Raw, build, call, encode, name, new, overlapping, pickle_of, storage, tensor, write
from tests.support.properties import examples

PROOF = "executed"
FILES = Path(__file__).parent / "files"


def attacks() -> dict[str, Any]:
    """Return pickles that create the file ``executed`` or run other code under Python's unpickler."""
    mark = f"open({PROOF!r}, 'w').close()"
    return {
        "a call of os.system": call("os.system", f"touch {PROOF}"),
        "a call of posix.system": call("posix.system", f"touch {PROOF}"),
        "a call of exec": call("builtins.exec", mark),
        "eval under its old name": call("__builtin__.eval", f"open({PROOF!r}, 'w').close()"),
        "a chain of getattr": call(call("builtins.getattr", call("builtins.__import__", "os"), "mkdir"), PROOF),
        "a dotted name": call(Raw(encode("os") + encode("path.os.mkdir") + b"\x93"), PROOF),
        "a call of what a call gave": call(call("operator.attrgetter", "mkdir"), call("importlib.import_module", "os")),
        "functools.partial": call(call("functools.partial", name("os.mkdir"), PROOF)),
        "copyreg._reconstructor": call(
            "copyreg._reconstructor", name("subprocess.Popen"), name("builtins.object"), None
        ),
        "NEWOBJ of a process": new("subprocess.Popen", ["touch", PROOF]),
        "NEWOBJ_EX of a process": Raw(name("subprocess.Popen").code + encode((["touch", PROOF],)) + b"}\x92"),
        "state for a class": build(name("builtins.dict"), {"update": name("os.system")}),
        "state for a dict": build(Raw(b"}"), {"__class__": name("subprocess.Popen")}),
        "state that is a call": build(new("collections.OrderedDict"), call("os.mkdir", PROOF)),
        "slots state": build(new("torch.Tensor"), (None, {"__setstate__": name("os.mkdir")})),
        "a nested pickle of torch": call(
            "torch.storage._load_from_bytes", f"cos\nmkdir\n(X\x08\0\0\0{PROOF}tR.".encode()
        ),
        "a persistent id that is a call": Raw(call("os.mkdir", PROOF).code + b"Q"),
        "a persistent id in a persistent id": Raw(encode(("storage", Raw(storage("0", 2).code), "0", "cpu", 2)) + b"Q"),
        "a tensor whose memory is a call": call(
            "torch._utils._rebuild_tensor_v2", call("os.mkdir", PROOF), 0, (1,), (1,), False, {}
        ),
        "a tensor of another class": call(
            "torch._tensor._rebuild_from_type_v2", name("os.mkdir"), name("torch.Tensor"), (PROOF,), {}
        ),
        "a dict of a called factory": Raw(
            call("collections.defaultdict", name("os.mkdir")).code + encode(PROOF) + b"Ns"
        ),
        "a key that is a call": Raw(b"}" + call("os.mkdir", PROOF).code + b"Ns"),
        "numpy objects": build(
            call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), (0,), b"b"),
            (1, (1,), call("numpy.dtype", "O8", False, True), False, [call("os.mkdir", PROOF)]),
        ),
        "a numpy file": call("numpy.load", PROOF),
        "a model of torch": new("torch.fx.graph_module.GraphModule"),
        "an extension code": Raw(b"\x82\x01"),
        "INST": Raw(b"(X\x08\0\0\0executedios\nmkdir\n"),
        "OBJ": Raw(b"(" + name("os.mkdir").code + encode(PROOF) + b"o"),
        "a buffer outside": Raw(b"\x97"),
        "a text number": Raw(b"I1\n"),
    }


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Make every way for a file to run code fail, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # Do the imports of reading a file first.
    SingleFileFormat().load(write(tmp_path / "sound.pth", {"state_dict": {"w": tensor()}}))

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"executed: {args}")

    with monkeypatch.context() as patch:
        for owner, attribute in (
            *((builtins, function) for function in ("eval", "exec")),
            *((pickle, function) for function in ("Unpickler", "_Unpickler", "load", "loads")),
            *((os, function) for function in ("system", "mkdir", "popen")),
            (subprocess, "Popen"),
            (importlib, "import_module"),
        ):
            patch.setattr(owner, attribute, forbidden)
        yield
    assert not Path(PROOF).exists()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("attack", attacks())
@pytest.mark.parametrize("place", ["the root", "the weights", "a weight", "next to the weights"])
def test_nothing_is_executed(tmp_path: Path, attack: str, place: str) -> None:
    """A malicious file is rejected, or only its valid weights are read."""
    evil = attacks()[attack]
    root = {
        "the root": evil,
        "the weights": {"state_dict": evil},
        "a weight": {"state_dict": {"w": tensor(), "v": evil}},
        "next to the weights": {"state_dict": {"w": tensor()}, "optimizer": evil, "args": evil},
    }[place]
    path = write(tmp_path / "evil.pth", root)
    try:
        tree = CheckpointLoader.load_checkpoint(path)
    except CheckpointError as error:
        assert "evil.pth" in str(error)
        return
    # If the file is not rejected, the result contains no objects.
    flatten_tree(tree)
    if place == "next to the weights":
        assert tree["state_dict"]["w"].tolist() == [1, 2]


def test_the_attacks_work_in_pythons_unpickler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's unpickler executes these files, so the attacks in the test above are effective."""
    monkeypatch.chdir(tmp_path)
    for attack in ("a call of os.system", "eval under its old name", "a chain of getattr", "functools.partial"):
        pickle.loads(pickle_of(attacks()[attack]))
        proof = tmp_path / PROOF
        assert proof.exists(), attack
        proof.rmdir() if proof.is_dir() else proof.unlink()


INVALID_TENSORS: dict[str, Raw] = {
    "a negative size": tensor(size=(-1,)),
    "a negative offset": tensor(offset=-1),
    "a negative stride": tensor(stride=(-1,)),
    "an offset beyond the end": tensor(offset=3, size=(0,)),
    "a size beyond the end": tensor(size=(3,)),
    "a stride beyond the end": tensor(stride=(2,)),
    "a huge size": tensor(size=(1 << 80,)),
    "a huge size without elements": tensor(size=(0, 1 << 61, 1 << 61), stride=(1, 1, 1)),
    "a huge stride": tensor(stride=(1 << 62,)),
    "sizes that overflow": tensor(size=(1 << 33, 1 << 33), stride=(0, 0)),
    "few bytes expanded to many": tensor(size=(1 << 40,), stride=(0,)),
    "a bool as size": tensor(size=(True,)),
    "a float as offset": tensor(offset=Raw(b"G" + struct.pack(">d", 0.0))),
    "more strides than sizes": tensor(stride=(1, 1)),
    "too many dimensions": tensor(size=(1,) * 65, stride=(1,) * 65),
    "an extremely long size": tensor(size=(1 << 20_000,)),
    "less memory than declared": tensor(numel=1),
    "more memory than the file has": tensor(size=(1 << 40,), numel=1 << 40),
    "missing memory": tensor(key="7"),
    "memory outside the folder": tensor(key="../data.pkl"),
    "a key that is not a string": tensor(key=0),
    "a negative length": tensor(numel=-2, size=(0,)),
    "a sparse tensor with indices out of range": call(
        "torch._utils._rebuild_sparse_tensor",
        call("torch.serialization._get_layout", "torch.sparse_coo"),
        (
            call("torch._utils._rebuild_tensor_v2", storage("0", 1, "torch.LongStorage"), 0, (1, 1), (1, 1), False, {}),
            tensor(size=(1,)),
            (2,),
        ),
    ),
}


@pytest.mark.parametrize("case", INVALID_TENSORS)
def test_wrong_sizes_and_offsets_are_rejected(tmp_path: Path, case: str) -> None:
    """A tensor whose offsets or sizes exceed its storage or the file is reported as damage."""
    data = {"0": struct.pack("<2f", 1, 2)} if "sparse" not in case else {"0": struct.pack("<q", 1 << 40)}
    path = write(tmp_path / "a.pth", {"state_dict": {"w": INVALID_TENSORS[case]}}, data)
    with pytest.raises(
        CheckpointDamagedError, match=r"a\.pth cannot be read: .*(state_dict/w|tensor storage|the record)"
    ):
        SingleFileFormat().load(path)


def test_a_container_that_contains_itself_is_rejected(tmp_path: Path) -> None:
    """A list that contains itself raises an error instead of an endless loop."""
    path = write(tmp_path / "a.pth", {"state_dict": {"w": tensor(), "v": Raw(b"]q\x05h\x05a")}})
    with pytest.raises(CheckpointDamagedError, match="state_dict/v.* contains itself"):
        SingleFileFormat().load(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lists", "tuples", "objects"])
def test_deep_nesting_is_rejected(tmp_path: Path, kind: str) -> None:
    """Twenty thousand nested containers do not overflow the stack."""
    deep = {
        "lists": b"]" * 20_000 + b"a" * 99_999,
        "tuples": b")" + b"\x85" * 20_000,
        "objects": name("collections.OrderedDict").code * 20_000 + b")" + b"\x85R" * 20_000,
    }[kind]
    path = write(tmp_path / "a.pth", {"state_dict": {"w": tensor(), "v": Raw(deep)}})
    with pytest.raises(CheckpointError, match="nested too deeply|malformed"):
        SingleFileFormat().load(path)


@pytest.mark.slow
def test_deep_keys_are_rejected(tmp_path: Path) -> None:
    """Nested tuples as a key are rejected before they are hashed, which could crash the process."""
    path = write(tmp_path / "a.pth", Raw(b"}" + b")" + b"\x85" * 300_000 + b"Ns"))
    with pytest.raises(CheckpointDamagedError, match="cannot use this tuple as a dictionary key"):
        SingleFileFormat().load(path)


def test_shared_lists_are_read_once(tmp_path: Path) -> None:
    """Forty lists that each contain the next one twice are read in linear time."""
    laughs = b"]q\x01" + b"".join(b"0](h%ch%ceq%c" % (level, level, level + 1) for level in range(1, 41))
    path = write(tmp_path / "a.pth", {"state_dict": {"w": tensor()}, "v": Raw(laughs)})
    tree = SingleFileFormat().load(path)
    assert tree["v"][0] is tree["v"][1]


BOMBS = {
    "a huge memo index": b"Nr\xff\xff\xff\x7f.",
    "a string without data": b"\x8d" + struct.pack("<Q", 1 << 40) + b".",
    "bytes without data": b"\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "a bytearray without data": b"\x96" + struct.pack("<Q", 1 << 40) + b".",
    "an integer without data": b"\x8b\xff\xff\xff\x7f.",
    "an integer of negative length": b"\x8b\xff\xff\xff\xff.",
    "a frame longer than the file": b"\x95" + struct.pack("<Q", 1 << 60) + b"N.",
}
_PROBE = """
import resource, sys
from pathlib import Path
from stratagem.checkpoint import SingleFileFormat
from stratagem.checkpoint.restricted_unpickler import ValueBuilder, read_pickle
from stratagem.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        SingleFileFormat().load(path)
    except CheckpointError as error:
        print(path.name, str(error)[-60:], file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    """Files that claim gigabytes are rejected with less than 60 MB of memory."""
    for index, bomb in enumerate(BOMBS.values()):
        write(tmp_path / f"{index}.pth", b"\x80\x04" + bomb)
    for index, case in enumerate(INVALID_TENSORS.values()):
        write(tmp_path / f"case {index}.pth", {"state_dict": {"w": case}})
    copies = {"state_dict": {str(i): tensor(size=(1 << 20,), key=str(i), numel=1 << 20) for i in range(500)}}
    overlapping(tmp_path / "overlap.pth", copies, 500, 4 << 20)
    done = subprocess.run([sys.executable, "-c", _PROBE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000, done.stderr  # kilobytes


def test_overlapping_records_are_rejected(tmp_path: Path) -> None:
    """A zip directory that lists the same bytes as several records is rejected."""
    path = overlapping(tmp_path / "a.pth", {"state_dict": {"w": tensor()}}, 2, 8)
    with pytest.raises(CheckpointDamagedError, match="overlap"):
        SingleFileFormat().load(path)


REAL = zipfile.ZipFile(FILES / "mmengine_0.10.7_epoch_1.pth").read("archive/data.pkl")


class NoMemory:
    """A source of storages of any reasonable size."""

    size = 10_000

    def storage(self, key: str, length: int) -> torch.UntypedStorage:
        if length > self.size:
            raise CheckpointDamagedError(key)
        return torch.UntypedStorage(length)


@given(
    changes=st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, len(REAL) - 1),
    gap=st.sampled_from([0, 1, 7]),
)
@settings(max_examples=examples(300))
def test_a_changed_pickle_is_never_another_exception(changes: list[tuple[int, int]], cut: int, gap: int) -> None:
    """Reading a real pickle with changed or missing bytes returns values or raises a CheckpointError, but no other exception."""
    data = bytearray(REAL)
    for place, octet in changes:
        data[place] = octet
    del data[cut : cut + gap]
    try:
        root = read_pickle(bytes(data))
        ValueBuilder(NoMemory()).build(root, "root")
    except CheckpointError:
        return


def test_terminal_codes_in_names_are_not_printed(tmp_path: Path) -> None:
    """Errors show names from a file shortened and without terminal control codes."""
    path = write(tmp_path / "a.pth", {"state_dict": {"\x1b[2J": call("\x1b[31mos.system", "x"), "w": tensor()}})
    with pytest.raises(CheckpointError) as caught:
        SingleFileFormat().load(path)
    assert "\x1b" not in str(caught.value)
    path = write(tmp_path / "b.pth", {"state_dict": {"k" * 10_000: call("os.system", "x"), "w": tensor()}})
    with pytest.raises(CheckpointError) as caught:
        SingleFileFormat().load(path)
    assert len(str(caught.value)) < 1000


def test_malicious_entries_are_never_read(tmp_path: Path) -> None:
    """The weights in a malicious file are equal to those in a harmless one, because other entries are not read."""
    path = write(tmp_path / "a.pth", {"state_dict": {"w": tensor()}, "x": call("os.system", "true")})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert SingleFileFormat().load(path)["state_dict"]["w"].tolist() == [1, 2]
