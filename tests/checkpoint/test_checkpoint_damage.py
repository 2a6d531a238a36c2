"""A damaged, foreign or missing checkpoint raises a CheckpointError with a clear message, and never yields wrong values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stratagem.checkpoint import DirectoryFormat
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from tests.support.manifests import change_manifest

FORMAT = DirectoryFormat()
FILES = ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is never modified."""
    path = tmp_path_factory.mktemp("damage") / "epoch_3"
    FORMAT.save(
        {
            "meta": {"epoch": 3, "lr": 0.125, "done": True},
            "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])},
            "optimizer": {"state": {"w": {"step": torch.tensor(3.0)}}},
        },
        path,
    )
    return path


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "epoch_3"))


def test_the_copy_can_be_loaded(damaged: Path) -> None:
    """The checkpoint of these tests can be loaded before it is damaged."""
    assert FORMAT.load(damaged)["meta"] == {"epoch": 3, "lr": 0.125, "done": True}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, -1])
def test_a_truncated_file_is_named(damaged: Path, name: str, part: float) -> None:
    """A file truncated at any position is reported by name, with exit status 1."""
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:-1] if part < 0 else data[: int(part * len(data))])
    with pytest.raises(CheckpointDamagedError, match=name) as caught:
        FORMAT.load(damaged)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    """A removed file is reported by name."""
    (damaged / name).unlink()
    with pytest.raises(CheckpointDamagedError, match=f"{name} is missing"):
        FORMAT.load(damaged)


@pytest.mark.parametrize("name", FILES)
def test_an_extended_file_is_named(damaged: Path, name: str) -> None:
    """Extra bytes at the end of a file are reported as damage."""
    with (damaged / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointDamagedError, match=name):
        FORMAT.load(damaged)


def test_an_unrequested_part_must_exist(damaged: Path) -> None:
    """A checkpoint with a missing part is rejected even if that part is not requested."""
    (damaged / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointDamagedError, match="optimizer"):
        FORMAT.load(damaged, parts={"state_dict"})


def flips(name: str, path: Path) -> list[tuple[int, int]]:
    """Return (offset, mask) of a change to every byte of a file."""
    return [(offset, 1 << (offset * 5 + turn) % 8) for offset in range((path / name).stat().st_size) for turn in (0, 3)]


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.slow
def test_a_flipped_bit_is_damage(damaged: Path, name: str) -> None:
    """A flipped bit anywhere in JSON, a safetensors header or a tensor is reported as damage."""
    data = (damaged / name).read_bytes()
    unnoticed: list[tuple[int, int]] = []
    messages: list[str] = []
    for offset, mask in flips(name, damaged):
        changed = bytearray(data)
        changed[offset] ^= mask
        (damaged / name).write_bytes(changed)
        try:
            FORMAT.load(damaged)
            unnoticed.append((offset, mask))
        except CheckpointDamagedError as error:
            messages.append(str(error))
    assert unnoticed == []
    assert all(name in message for message in messages)


@pytest.mark.slow
def test_a_flipped_bit_of_the_manifest_is_an_error(damaged: Path) -> None:
    """A flipped bit anywhere in the manifest makes the checkpoint unusable, and the error names the manifest."""
    file = damaged / "manifest.json"
    data = file.read_bytes()
    for offset, mask in flips(file.name, damaged):
        changed = bytearray(data)
        changed[offset] ^= mask
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            FORMAT.load(damaged)


@pytest.mark.parametrize(("name", "tensor"), [("model", "w"), ("model", "b"), ("optimizer", "state/w/step")])
def test_a_flipped_bit_of_a_tensor_is_reported_by_name(damaged: Path, name: str, tensor: str) -> None:
    """The error for a modified tensor names the file and the tensor."""
    file = damaged / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    data[begin] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=rf"{name}\.safetensors: the tensor '{tensor}' is corrupted"):
        FORMAT.load(damaged)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "state.json").write_text("[" * 100_000),
        lambda path: change_manifest(path, files=...),
        lambda path: change_manifest(path, files=[]),
        lambda path: change_manifest(path, files={"state.json": "1"}),
        lambda path: change_manifest(path, files={"../epoch_3/state.json": 1}),
        lambda path: change_manifest(path, files={}),
        lambda path: change_manifest(path, saved_at=...),
        lambda path: change_manifest(path, saved_at="yesterday"),
        lambda path: change_manifest(path, saved_at=float("nan")),
        lambda path: change_manifest(path, tensors=...),
        lambda path: change_manifest(path, tensors=[]),
        lambda path: (path / "manifest.json").write_text("[" * 100_000),
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
    ],
)
def test_malformed_files_are_damage(damaged: Path, spoil: Callable[[Path], object]) -> None:
    """Malformed or nonsensical JSON is reported as damage, without other exceptions."""
    spoil(damaged)
    with pytest.raises(CheckpointDamagedError, match=r"\.json"):
        FORMAT.load(damaged)


def test_swapped_files_are_damage(damaged: Path) -> None:
    """Files swapped with others of the same size are detected, even without verification of all bytes."""
    content = (damaged / "model.safetensors").read_bytes().replace(b'"w"', b'"v"')
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=r"model\.safetensors is corrupted"):
        FORMAT.load(damaged)
    with pytest.raises(CheckpointDamagedError, match=r"model\.safetensors: The tensor 'w' is missing"):
        FORMAT.load(damaged, verify=False)


@pytest.mark.parametrize("content", ['{"format": "other", "version": 1}', "{}", "[]", "null", "3"])
def test_the_manifest_of_another_program_is_reported(damaged: Path, content: str) -> None:
    """A manifest written by another program is identified as such and is not reported as damage."""
    (damaged / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="was written by a different program") as caught:
        FORMAT.load(damaged)
    assert type(caught.value) is CheckpointError
    assert caught.value.exit_status == 2


def test_a_newer_format_version_is_reported(damaged: Path) -> None:
    """The error for a newer format version contains that version and the version of Stratagem that wrote it."""
    change_manifest(damaged, version=3, stratagem="9.0")
    with pytest.raises(CheckpointError, match=r"has format version 3.* reads format version 2.*\(9\.0\)") as caught:
        FORMAT.load(damaged)
    assert type(caught.value) is CheckpointError


def test_other_folders_and_files_are_reported(tmp_path: Path) -> None:
    """A folder without a manifest, or an unrelated file, raises an error that shows what a checkpoint looks like."""
    (tmp_path / "notes").write_text("hello")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path, tmp_path / "notes", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=r"is not a Stratagem checkpoint.*epoch_3") as caught:
            FORMAT.load(path)
        assert type(caught.value) is CheckpointError


def test_a_missing_checkpoint_is_not_found(tmp_path: Path) -> None:
    """A missing checkpoint raises an error that is also a FileNotFoundError."""
    with pytest.raises(CheckpointNotFoundError, match="epoch_9: there is no such checkpoint") as caught:
        FORMAT.load(tmp_path / "epoch_9")
    assert isinstance(caught.value, FileNotFoundError)
