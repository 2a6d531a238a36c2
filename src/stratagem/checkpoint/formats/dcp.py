"""Read and write ``torch.distributed.checkpoint`` (DCP) directories, without executing code from them.

The metadata file ``.metadata`` is a pickle, which is read by an unpickler that allows only the classes that torch
writes to it. Tensors and other values are read with ``weights_only=True``.

DCP stores only leaves: it drops empty containers, turns all keys into strings, and rejects trees in which two paths look
the same once they are joined by dots. A directory written by this module therefore also contains the tree's JSON
description (:mod:`~stratagem.checkpoint.tree.flatten`) under the key ``stratagem_tree``. Torch and other tools ignore it.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.checkpoint.tree.flatten import (
    StateTree,
    TreePath,
    flatten_tree,
    plain_leaves,
    tensor_paths,
    unflatten_tree,
)
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from stratagem.storage import atomic_directory
from stratagem.utils import import_module

__all__ = ["DcpDirectory", "is_dcp_directory", "save_dcp"]

_METADATA = ".metadata"
# The keys of the tree's JSON description, and of tensors whose path is ambiguous once it is joined by dots.
_TREE, _OTHER_TENSORS = "stratagem_tree", "stratagem_tensors"
# All classes and functions that DCP metadata of format version 1 refers to.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip

# A function that returns an uninitialized tensor with the given shape and dtype.
Allocate = Callable[[Sequence[int], torch.dtype], Tensor]


def is_dcp_directory(path: Path) -> bool:
    """Return whether ``path`` is a directory written by ``torch.distributed.checkpoint``."""
    return (path / _METADATA).is_file()


@final
class DcpDirectory:
    """Read a directory written by ``torch.distributed.checkpoint``.

    Args:
        path: the directory.

    Raises:
        CheckpointNotFoundError: if ``path`` is not such a directory.
        CheckpointError: if the metadata refers to classes that torch does not write to metadata.
        CheckpointDamagedError: if the metadata cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if not is_dcp_directory(path):
            raise CheckpointNotFoundError(
                f"{path} is not a directory written by torch.distributed.checkpoint: it does not contain {_METADATA}."
            )
        self._path = path
        self._metadata = _read_metadata(path / _METADATA)
        self._places = {
            (index.fqn, None if index.offset is None else tuple(index.offset)): info
            for index, info in (self._metadata.storage_data or {}).items()
        }

    def load(self, *, parts: Collection[str] | None = None, allocate: Allocate | None = None) -> StateTree:
        """Read the tree, or only some of its top-level parts. Holds at most one additional chunk of a tensor in memory.

        Args:
            parts: the names of the parts to read; all by default.
            allocate: returns the tensor to fill, given a shape and a dtype; by default a new CPU tensor.

        Raises:
            CheckpointError: if a value can only be created by executing code.
            CheckpointDamagedError: if a file is missing or unreadable.
        """
        make = allocate or _allocate_on_cpu
        if _TREE in self._metadata.state_dict_metadata:
            return self._load_described(parts, make)
        tree: StateTree = {}
        for name, described in self._metadata.state_dict_metadata.items():
            path = (self._metadata.planner_data or {}).get(name, (name,))
            if parts is None or path[0] in parts:
                value = self._tensor(name, described, make) if hasattr(described, "chunks") else self._value(name)
                _put(tree, path, value)
        return {name: _with_lists(part) for name, part in tree.items()}

    def _load_described(self, parts: Collection[str] | None, allocate: Allocate) -> StateTree:
        """Restore the tree that :func:`save_dcp` wrote from its description."""
        try:
            skeleton = json.loads(self._value(_TREE))
        except (TypeError, ValueError) as error:
            raise CheckpointDamagedError(
                f"{self._path}: the metadata that describes the structure of the checkpoint cannot be read: {error}"
            ) from error
        if not isinstance(skeleton, dict):
            raise CheckpointDamagedError(
                f"{self._path}: the metadata that describes the structure of the checkpoint is not an object."
            )
        described = self._metadata.state_dict_metadata
        # Compute the paths from the whole description: they depend on all parts.
        paths = _dcp_paths(skeleton)
        wanted = skeleton if parts is None else {name: part for name, part in skeleton.items() if name in parts}
        tensors = {}
        for name in tensor_paths(wanted):
            key = _joined(paths[name])
            if not hasattr(described.get(key), "chunks"):
                raise CheckpointDamagedError(f"{self._path}: the tensor {key} is missing.")
            tensors[name] = self._tensor(key, described[key], allocate)
        tree: StateTree = unflatten_tree(tensors, wanted)
        return tree

    def _tensor(self, name: str, described: Any, allocate: Allocate) -> Tensor:
        tensor = allocate(described.size, described.properties.dtype)
        filled = 0
        for chunk in described.chunks:
            content = self._read(name, tuple(chunk.offsets))
            if not isinstance(content, Tensor) or content.shape != chunk.sizes:
                raise CheckpointDamagedError(f"{self._path}: a chunk of {name} does not match the metadata.")
            TensorBox(tuple(chunk.offsets), tuple(chunk.sizes)).of(tensor).copy_(content)
            filled += content.numel()
        if filled != tensor.numel():
            raise CheckpointDamagedError(
                f"{self._path}: {name} has {tensor.numel()} elements, but only {filled} of them are stored."
            )
        return tensor

    def _value(self, name: str) -> Any:
        return self._read(name, None)

    def _read(self, name: str, offset: tuple[int, ...] | None) -> Any:
        info = self._places.get((name, offset))
        if info is None:
            raise CheckpointDamagedError(f"{self._path}: the metadata does not specify where {name} is stored.")
        if info.transform_descriptors:
            raise CheckpointError(
                f"{self._path}: {name} is stored with the transforms {info.transform_descriptors}, which are not supported. "
                "Save it without extensions."
            )
        file = self._path / info.relative_path
        if Path(info.relative_path).name != str(info.relative_path):
            raise CheckpointError(
                f"{self._path}: the metadata stores {name} in {info.relative_path}, outside the directory."
            )
        try:
            with file.open("rb") as opened:
                opened.seek(info.offset)
                data = opened.read(info.length)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointDamagedError(f"{file} is missing; the checkpoint is incomplete.") from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file}: {name} contains objects that can only be created by executing code from the file, so it was "
                "not read."
            ) from error
        except Exception as error:  # The error class depends on where the file is damaged.
            raise CheckpointDamagedError(f"{file} cannot be read at {name}: {error}") from error


def save_dcp(tree: StateTree, path: Path) -> None:
    """Write a tree as a ``torch.distributed.checkpoint`` directory, published as ``path`` with a single rename.

    Raises:
        CheckpointError: if a value cannot be stored, or the file system reports an error.
    """
    dcp = import_module("torch.distributed.checkpoint")
    leaves, paths = _flat_state(tree)
    try:
        with atomic_directory(path) as temporary, warnings.catch_warnings():
            # Suppress torch's warning that only this process saves, because that is intended.
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(leaves, storage_writer=dcp.FileSystemWriter(temporary), planner=_planner(paths), no_dist=True)
    except (OSError, RuntimeError) as error:
        raise save_error(path, error) from error


def _flat_state(tree: StateTree) -> tuple[dict[str, Any], dict[str, TreePath]]:
    """Return the leaves to save, keyed by name, and the path of each name in the nested state dict that other tools read."""
    tensors, skeleton = flatten_tree(tree)
    paths = _dcp_paths(skeleton)
    leaves: dict[str, Any] = {_joined(paths[name]): tensor for name, tensor in tensors.items()}
    mapping = {_joined(path): path for path in paths.values()}
    inner = {path[:end] for path in paths.values() for end in range(1, len(path))}
    for path, value in plain_leaves(skeleton):
        name = _joined(path)
        # Store a value whose name is ambiguous only in the description.
        if name not in leaves and name != _TREE and path not in inner:
            leaves[name], mapping[name] = value, path
    return {**leaves, _TREE: json.dumps(skeleton)}, {**mapping, _TREE: (_TREE,)}


def _planner(paths: Mapping[str, TreePath]) -> Any:
    """Return a planner that saves flat leaves and records their paths in the nested state dict."""
    planner = import_module("torch.distributed.checkpoint").DefaultSavePlanner()
    set_up = planner.set_up_planner

    def set_up_with_paths(*args: Any, **kwargs: Any) -> None:
        set_up(*args, **kwargs)
        planner.mappings = dict(paths)

    planner.set_up_planner = set_up_with_paths
    return planner


def _dcp_paths(skeleton: Any) -> dict[str, TreePath]:
    """Return a mapping from tensor names to paths in the saved state dict."""
    paths: dict[str, TreePath] = {}
    used = {_TREE}
    for number, (name, path) in enumerate(tensor_paths(skeleton).items()):
        if _joined(path) in used or path[0] in {_TREE, _OTHER_TENSORS}:
            path = (_OTHER_TENSORS, str(number))  # noqa: PLW2901
        used.add(_joined(path))
        paths[name] = path
    return paths


def _joined(path: Sequence[object]) -> str:
    return ".".join(str(key) for key in path)


@final
class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that only allows the classes in DCP metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"it refers to {module}.{name}, which torch never writes to metadata, so the file was not read."
        )


def _read_metadata(file: Path) -> Any:
    # Import the classes before the unpickler looks them up.
    metadata = import_module("torch.distributed.checkpoint.metadata")
    import_module("torch.distributed.checkpoint.filesystem")
    try:
        read = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:  # The error class depends on where the file is damaged.
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    if not isinstance(read, metadata.Metadata):
        raise CheckpointError(f"{file} is not a torch.distributed.checkpoint metadata file.")
    return read


def _allocate_on_cpu(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype)


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_lists(node: Any) -> Any:
    """Convert dicts with the keys 0, 1, 2, ... back to lists."""
    if not isinstance(node, dict):
        return node
    built = {key: _with_lists(value) for key, value in node.items()}
    return [built[index] for index in range(len(built))] if built and set(built) == set(range(len(built))) else built
