"""Directories of ``torch.distributed.checkpoint``, read without running what they hold.

Such a directory describes itself in ``.metadata``, which is a pickle. It is read by an unpickler that knows the few
classes that torch writes there and refuses every other name; tensors and values are read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.checkpoint.tree.flatten import StateTree
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from stratagem.storage import atomic_directory
from stratagem.utils import import_module

__all__ = ["DcpDirectory", "is_dcp_directory", "save_dcp"]

_METADATA = ".metadata"
# All that torch itself writes into a description of version 1.
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

# Returns an uninitialised tensor of a shape and type.
Allocate = Callable[[Sequence[int], torch.dtype], Tensor]


def is_dcp_directory(path: Path) -> bool:
    """Tell whether a path is a directory that ``torch.distributed.checkpoint`` wrote."""
    return (path / _METADATA).is_file()


@final
class DcpDirectory:
    """Reads a directory of ``torch.distributed.checkpoint``.

    Args:
        path: the directory.

    Raises:
        CheckpointNotFoundError: if it is none.
        CheckpointError: if its description needs more than torch's own classes.
        CheckpointDamagedError: if its description cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if not is_dcp_directory(path):
            raise CheckpointNotFoundError(
                f"{path}: there is no {_METADATA} in it, so it is no directory of torch's DCP."
            )
        self._path = path
        self._metadata = _read_metadata(path / _METADATA)
        self._places = {
            (index.fqn, None if index.offset is None else tuple(index.offset)): info
            for index, info in (self._metadata.storage_data or {}).items()
        }

    def load(self, *, parts: Collection[str] | None = None, allocate: Allocate | None = None) -> StateTree:
        """Read the tree, or only some of its top-level parts; one chunk of a tensor is in memory besides the tensors.

        Args:
            parts: names of the parts; all by default.
            allocate: makes a tensor of a shape and type, which is then filled; by default in memory.

        Raises:
            CheckpointError: if a value could only be made by running code.
            CheckpointDamagedError: if a file is missing or unreadable.
        """
        make = allocate or _in_memory
        tree: StateTree = {}
        for name, described in self._metadata.state_dict_metadata.items():
            path = (self._metadata.planner_data or {}).get(name, (name,))
            if parts is None or path[0] in parts:
                value = self._tensor(name, described, make) if hasattr(described, "chunks") else self._value(name)
                _put(tree, path, value)
        return {name: _with_lists(part) for name, part in tree.items()}

    def _tensor(self, name: str, described: Any, allocate: Allocate) -> Tensor:
        tensor = allocate(described.size, described.properties.dtype)
        filled = 0
        for chunk in described.chunks:
            content = self._read(name, tuple(chunk.offsets))
            if not isinstance(content, Tensor) or content.shape != chunk.sizes:
                raise CheckpointDamagedError(f"{self._path}: a chunk of {name} is not what its description says.")
            TensorBox(tuple(chunk.offsets), tuple(chunk.sizes)).of(tensor).copy_(content)
            filled += content.numel()
        if filled != tensor.numel():
            raise CheckpointDamagedError(
                f"{self._path}: {name} has {tensor.numel()} numbers, of which {filled} are there."
            )
        return tensor

    def _value(self, name: str) -> Any:
        return self._read(name, None)

    def _read(self, name: str, offset: tuple[int, ...] | None) -> Any:
        info = self._places.get((name, offset))
        if info is None:
            raise CheckpointDamagedError(f"{self._path}: its description does not say where {name} is.")
        if info.transform_descriptors:
            raise CheckpointError(
                f"{self._path}: {name} is stored transformed ({info.transform_descriptors}), which is not read. Save it "
                "without extensions."
            )
        file = self._path / info.relative_path
        if Path(info.relative_path).name != str(info.relative_path):
            raise CheckpointError(
                f"{self._path}: {name} is said to be in {info.relative_path}, outside of the directory."
            )
        try:
            with file.open("rb") as opened:
                opened.seek(info.offset)
                data = opened.read(info.length)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointDamagedError(f"{file} is missing; the checkpoint is not complete.") from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file}: {name} holds objects that only running code of the file's choice could make, so it is not read."
            ) from error
        except Exception as error:  # which class it is hangs on where the file is damaged
            raise CheckpointDamagedError(f"{file} cannot be read at {name}: {error}") from error


def save_dcp(tree: StateTree, path: Path) -> None:
    """Write a tree as a directory of ``torch.distributed.checkpoint``, published under ``path`` by one rename.

    Raises:
        CheckpointError: if the file system refuses.
    """
    dcp = import_module("torch.distributed.checkpoint")
    try:
        with atomic_directory(path) as aside, warnings.catch_warnings():
            # That this process saves alone is what is wanted.
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(tree, storage_writer=dcp.FileSystemWriter(aside), no_dist=True)
    except (OSError, RuntimeError) as error:
        raise save_error(path, error) from error


@final
class _AllowListed(pickle.Unpickler):
    """Knows the classes of torch's descriptions and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"it names {module}.{name}, which torch does not write there, so it is not read.")


def _read_metadata(file: Path) -> Any:
    # The classes are imported before the unpickler looks for them.
    metadata = import_module("torch.distributed.checkpoint.metadata")
    import_module("torch.distributed.checkpoint.filesystem")
    try:
        read = _AllowListed(io.BytesIO(file.read_bytes())).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:  # which class it is hangs on where the file is damaged
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    if not isinstance(read, metadata.Metadata):
        raise CheckpointError(f"{file} is not a description of torch.distributed.checkpoint.")
    return read


def _in_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype)


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_lists(node: Any) -> Any:
    """Turn dicts whose keys are 0, 1, 2 ... back into the lists that they were."""
    if not isinstance(node, dict):
        return node
    built = {key: _with_lists(value) for key, value in node.items()}
    return [built[index] for index in range(len(built))] if built and set(built) == set(range(len(built))) else built
