"""A checkpoint as a directory of safetensors files and JSON. No pickle is written or read.

``model.safetensors`` holds the model's state under the model's own names, as other tools expect; every other part that
has tensors has a file of its own; ``state.json`` holds all the rest, ``manifest.json`` the form's version, and of every
file its size and digests. ``docs/checkpoint-format.md`` specifies it.

Each rank writes its own pieces of tensors that are spread over ranks, at their places in one file, and whoever reads maps
the file: nothing is gathered, and the files are the same whatever the number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stratagem.checkpoint.directory.box_io import WrittenBox, create_file, write_boxes
from stratagem.checkpoint.directory.extra_files import describe_extra_files
from stratagem.checkpoint.directory.integrity import digest_of, parse_json
from stratagem.checkpoint.directory.manifest import (
    MANIFEST,
    MOST_JSON,
    STATE,
    check_replaceable,
    describe_tensors,
    make_manifest,
    read_json_file,
    read_manifest,
)
from stratagem.checkpoint.directory.snapshot import Snapshot, file_of, take_snapshot
from stratagem.checkpoint.directory.verify import verify_checkpoint
from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.staging import StagedState
from stratagem.checkpoint.tree.flatten import StateTree, unflatten_tree
from stratagem.distributed import ALONE, Team
from stratagem.errors import CheckpointDamagedError, CheckpointError, StratagemError
from stratagem.storage import atomic_directory, opened, operations, write_fully

__all__ = ["DirectoryFormat", "write_snapshot"]


@final
class DirectoryFormat:
    """Write and read a checkpoint directory."""

    def save(
        self,
        tree: StateTree,
        path: Path,
        team: Team = ALONE,
        *,
        write_extra_files: Callable[[Path], None] | None = None,
    ) -> None:
        """Write ``tree`` aside and publish it under ``path`` by one rename.

        Collective over ``team``: each rank gives its own tree, of which it writes the pieces of sharded tensors that it
        holds; all the rest is the first rank's. ``beside`` is called on every rank with the folder that is written, for
        files in another form that go with the tree.

        Raises:
            CheckpointError: if a value cannot be stored, the file system refuses, or there is a folder with something
                else; what was at ``path`` stays. On every rank.
        """
        write_snapshot(take_snapshot(tree, team), path, team, write_extra_files=write_extra_files)

    def stage(self, tree: StateTree, team: Team = ALONE) -> StagedState:
        """Take ``tree`` apart, for what is written later; tensors are not copied. Collective over ``team``.

        Raises:
            CheckpointError: if a value cannot be stored.
        """
        snapshot = take_snapshot(tree, team)
        # Without the tensors, which would be kept in memory as long as their copies.
        plan, skeletons = snapshot.plan, snapshot.skeletons
        places = list(snapshot.local_boxes)

        def write(tensors: Sequence[Tensor], path: Path, team: Team) -> None:
            write_snapshot(Snapshot(plan, skeletons, dict(zip(places, tensors, strict=True))), path, team)

        return StagedState(list(snapshot.local_boxes.values()), write)

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        verify: bool = True,
        team: Team = ALONE,
    ) -> StateTree:
        """Read the tree, or only some of its top-level parts.

        Tensors on the CPU are mapped from the file: what is not used is not read, and writing to one does not change the
        file. Collective over ``team``, whose ranks check a share of the bytes each.

        Args:
            path: the directory.
            map_location: the device of the tensors.
            parts: names of the parts; all by default.
            verify: whether every byte is compared with its digest.
            team: the ranks that load the same checkpoint.

        Raises:
            CheckpointNotFoundError: if there is no such directory.
            CheckpointError: if it is not one of ours.
            CheckpointDamagedError: if a file or tensor is missing or not what was written.
        """
        if verify:
            verify_checkpoint(path, team)
        return team.own(lambda: _read_tree(path, map_location, parts))

    def verify(self, path: Path, team: Team = ALONE) -> int:
        """Compare every byte with its digest; see :func:`~stratagem.checkpoint.directory.verify.verify_checkpoint`."""
        return verify_checkpoint(path, team)


def write_snapshot(
    snapshot: Snapshot, path: Path, team: Team = ALONE, *, write_extra_files: Callable[[Path], None] | None = None
) -> None:
    """Write a snapshot aside, durably, and give it its name by one rename. Collective over ``team``.

    Raises:
        CheckpointError: on every rank, if the file system refuses on any; what was at ``path`` stays.
    """
    team.first(lambda: _refuse(snapshot, path))
    try:
        with ExitStack() as aside:
            folder = team.first(lambda: _begin(aside, snapshot, path))
            written = team.each(lambda: _write_own(folder, snapshot, team))
            if write_extra_files is not None:
                team.each(lambda: write_extra_files(folder))
            team.first(lambda: _finish(folder, snapshot, written))
            # Syncs what is in the folder, renames it and syncs the parent.
            team.first(aside.close)
    except CheckpointError:
        raise
    except (OSError, ValueError, StratagemError) as error:
        raise save_error(path, error) from error


def _read_tree(path: Path, device: torch.device | str, parts: Collection[str] | None) -> StateTree:
    manifest = read_manifest(path)
    tree = {}
    for name, skeleton in _read_skeletons(path, manifest).items():
        if parts is not None and name not in parts:
            continue
        tensors = _map_tensors(path / file_of(name), device) if name in manifest["tensors"] else {}
        try:
            tree[name] = unflatten_tree(tensors, skeleton)
        except CheckpointDamagedError as error:
            raise CheckpointDamagedError(f"{path / file_of(name)}: {error}") from error
    return tree


def _refuse(snapshot: Snapshot, path: Path) -> None:
    """Refuse before anything is written what cannot end well."""
    check_replaceable(path)
    needed = snapshot.plan.size
    parent = next((folder for folder in path.parents if folder.exists()), path.anchor)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{path}: the checkpoint has {needed} bytes, but only {free} are free there. Free some space, keep fewer "
            "checkpoints (max_keep_ckpts), or save elsewhere."
        )


def _begin(aside: ExitStack, snapshot: Snapshot, path: Path) -> Path:
    """Make the folder and in it every file, in full size but without tensors."""
    folder = aside.enter_context(atomic_directory(path))
    _write_new(folder / STATE, _as_json(snapshot.skeletons))
    for part, layout in snapshot.plan.layouts.items():
        create_file(folder / file_of(part), layout)
    return folder


def _write_own(folder: Path, snapshot: Snapshot, team: Team) -> dict[str, list[WrittenBox]]:
    """Write this rank's pieces; return them by part."""
    written = {}
    for part, layout in snapshot.plan.layouts.items():
        pieces = list(snapshot.boxes_of(part))
        if not pieces:
            continue
        try:
            written[part] = write_boxes(folder / file_of(part), layout, pieces)
        except FileNotFoundError as error:
            if team.leads:
                raise
            raise CheckpointError(
                f"{folder.parent}: rank {team.rank} does not see what the first rank has just made there. A model that is "
                "spread over ranks is saved to a folder that all of them share; choose such a work_dir."
            ) from error
    return written


def _finish(folder: Path, snapshot: Snapshot, written: list[dict[str, list[WrittenBox]]]) -> None:
    """Write the manifest, last: a directory without it is no checkpoint."""
    state = _as_json(snapshot.skeletons)
    files: dict[str, dict[str, Any]] = {STATE: {"bytes": len(state), "digest": digest_of(state)}}
    tensors = {}
    for part, layout in snapshot.plan.layouts.items():
        header = {"bytes": len(layout.header), "digest": digest_of(layout.header)}
        files[file_of(part)] = {"bytes": layout.size, "header": header}
        tensors[part] = describe_tensors(layout, [piece for theirs in written for piece in theirs.get(part, ())])
    extra_files = describe_extra_files(folder, files)
    _write_new(folder / MANIFEST, make_manifest(snapshot.skeletons.get("meta"), files, tensors, extra_files))


def _as_json(content: Any) -> bytes:
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    if len(data) > MOST_JSON:
        raise CheckpointError(
            f"What the checkpoint holds beside tensors has {len(data)} bytes as JSON, more than the {MOST_JSON} that are "
            "read. Keep long lists of numbers as tensors."
        )
    return data


def _write_new(file: Path, data: bytes) -> None:
    with opened(operations.create_file(file)) as descriptor:
        write_fully(descriptor, data, 0)
        operations.fsync(descriptor)


def _read_skeletons(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    file = path / STATE
    try:
        data = read_json_file(file)
        if digest_of(data) != manifest["files"][STATE]["digest"]:
            raise CheckpointDamagedError(f"{file} is not what was written: its digest differs.")
        skeletons = parse_json(data)
    except (OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    if not isinstance(skeletons, dict):
        raise CheckpointDamagedError(f"{file} cannot be read: it has no parts.")
    return skeletons


def _map_tensors(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened_file:
            names: list[str] = opened_file.keys()
            tensors = {name: opened_file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    # Apart: safetensors knows few devices, and one that it does not know is no damage.
    return {name: tensor.to(device) for name, tensor in tensors.items()}
