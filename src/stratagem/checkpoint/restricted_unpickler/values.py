"""Build tensors and plain values from an interpreted pickle, and nothing else.

Objects whose constructor is in the table below are built by functions of this module, which never import or call
anything that the file refers to. All other objects remain placeholders, and requesting one raises an error that
contains its name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol, final

import torch

from stratagem.checkpoint.restricted_unpickler.numpy_values import array_from_bytes, array_of, scalar_of
from stratagem.checkpoint.restricted_unpickler.pickled_objects import PersistentId, PickledGlobal, PickledObject
from stratagem.checkpoint.restricted_unpickler.tensors import DTYPES, LAYOUTS, sparse_tensor, strided_tensor
from stratagem.checkpoint.tree.flatten import with_versions
from stratagem.errors import CheckpointDamagedError, CheckpointError

__all__ = ["UnsupportedObjectError", "ValueBuilder", "is_tensor", "mapping_items", "printable"]

_DICTS = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
}
# Tensor classes that can be replaced by a plain tensor.
_TENSOR_CLASSES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_MAX_EXPANDED_BYTES = 256 << 20
# The optional arguments of a tensor's rebuild function after its stride: requires_grad, hooks, metadata.
_MAX_OPTIONAL_ARGUMENTS = 3


class UnsupportedObjectError(CheckpointError):
    """A requested value could only be created by executing code from the file."""


class StorageReader(Protocol):
    """A source of tensor storages."""

    size: int

    def storage(self, key: str, length: int) -> torch.UntypedStorage:
        """Return the tensor storage ``key``, which has ``length`` bytes, on the CPU."""


@final
class ValueBuilder:
    """Build the values of an interpreted pickle, each only once, so that shared objects stay shared.

    Tensors are on ``device``, and their storage is read when their value is requested.
    """

    def __init__(self, reader: StorageReader, device: torch.device | str = "cpu") -> None:
        self._reader = reader
        self._device = torch.device(device)
        # The entries keep the nodes alive, so that their IDs are not reused.
        self._built: dict[int, tuple[Any, Any]] = {}
        self._in_progress: set[int] = set()
        self._memory: dict[str, torch.UntypedStorage] = {}
        self._expanded_bytes = 0

    def build(self, node: Any, where: str) -> Any:
        """Return the value of ``node``; ``where`` is its name in error messages.

        Raises:
            UnsupportedObjectError: if the value is, or contains, an object that can only be created by executing code.
            CheckpointDamagedError: if the description of the value is malformed.
        """
        try:
            return self._build(node, where)
        except RecursionError as error:
            raise CheckpointDamagedError(f"{where} is nested too deeply.") from error

    def _build(self, node: Any, where: str) -> Any:
        if not isinstance(node, PickledObject | PickledGlobal | PersistentId | dict | list | tuple | set | frozenset):
            return node
        if isinstance(node, PickledGlobal):
            return self._global(node, where)
        built = self._built.get(id(node))
        if built is not None:
            return built[1]
        if id(node) in self._in_progress:
            raise CheckpointDamagedError(f"{where} contains itself.")
        self._in_progress.add(id(node))
        try:
            value = self._build_new(node, where)
        finally:
            self._in_progress.discard(id(node))
        self._built[id(node)] = (node, value)
        return value

    def _build_new(self, node: Any, where: str) -> Any:
        try:
            return self._build_object(node, where) if isinstance(node, PickledObject) else self._container(node, where)
        except (CheckpointError, RecursionError):
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            kind = printable(node.qualified_name) if isinstance(node, PickledObject) else type(node).__name__
            raise CheckpointDamagedError(f"{where} is not a valid {kind}: {_first_line(error)}") from error

    def _container(self, node: Any, where: str) -> Any:
        if isinstance(node, PersistentId):
            raise UnsupportedObjectError(f"{where} is the storage of a tensor, not a tensor.")
        if isinstance(node, dict):
            return dict(self._entries(node.items(), where))
        if isinstance(node, list | tuple):
            items = [self._build(item, f"{where}/{index}") for index, item in enumerate(node)]
            return items if isinstance(node, list) else tuple(items)
        return type(node)(self._build(item, where) for item in node)

    def _build_object(self, node: PickledObject, where: str) -> Any:
        builder = _BUILDERS.get(node.qualified_name) if isinstance(node.constructor, PickledGlobal) else None
        if builder is None:
            kind = printable(node.qualified_name)
            raise UnsupportedObjectError(
                f"{where} is an object of type {kind}, which can only be created by executing code."
            )
        return builder(self, node, where)

    def _entries(self, pairs: Any, where: str) -> Iterator[tuple[Any, Any]]:
        for key, value in pairs:
            name = self._build(key, f"a key of {where}")
            if not isinstance(name, str | bytes | int | float | tuple | type(None)):
                raise CheckpointDamagedError(f"{where} has a {type(name).__name__} as a key.")
            yield name, self._build(value, f"{where}/{printable(name)}")

    def _global(self, node: PickledGlobal, where: str) -> Any:
        if str(node) in DTYPES:
            return DTYPES[str(node)]
        raise UnsupportedObjectError(
            f"{where} is {printable(str(node))}, a class or function, which is never imported."
        )

    # ---- builders: each reads the arguments that it needs and ignores others, such as hooks

    def dictionary(self, node: PickledObject, where: str) -> dict[Any, Any]:
        entries: OrderedDict[Any, Any] = OrderedDict()
        # The first argument of a defaultdict is a function; for other types, it is the initial contents.
        if node.args and node.qualified_name != "collections.defaultdict":
            (given,) = self._build(node.args, where)
            entries.update(given)
        entries.update(self._entries(node.pairs, where))
        if node.qualified_name != "collections.OrderedDict":
            return dict(entries)
        versions = node.state.get("_metadata") if isinstance(node.state, dict) else None
        if versions is None:
            return entries
        return with_versions(entries, self._build(versions, f"{where}/_metadata"))

    def collection(self, node: PickledObject, where: str) -> Any:
        kind = {"set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "Size": torch.Size}[
            node.constructor.name
        ]
        (items,) = self._build(node.args, where) if node.args else ((),)
        return kind(items)

    def bytes_value(self, node: PickledObject, where: str) -> bytes:
        if not node.args:
            return b""  # Python 3 writes empty bytes as a call to bytes().
        text, encoding = self._build(node.args, where)
        if encoding not in {"latin1", "latin-1"}:
            raise ValueError(f"its encoding is {encoding!r}")
        return str.encode(text, "latin-1")

    def complex_number(self, node: PickledObject, where: str) -> complex:
        real, imaginary = self._build(node.args, where)
        return complex(real, imaginary)

    def number(self, node: PickledObject, where: str) -> Any:
        dtype, data = node.args
        return scalar_of(dtype, self._build(data, where))

    def array(self, node: PickledObject, where: str) -> Any:
        kind = node.args[0]
        if str(kind) != "numpy.ndarray":
            raise UnsupportedObjectError(
                f"{where} is an array of the class {printable(str(kind))}, which is not imported."
            )
        return array_of(
            self._build(node.state[1], where), node.state[2], node.state[3], self._build(node.state[4], where)
        )

    def array_from_buffer(self, node: PickledObject, where: str) -> Any:
        data, dtype, shape, order = node.args
        return array_from_bytes(self._build(data, where), dtype, self._build(shape, where), order)

    def device(self, node: PickledObject, where: str) -> torch.device:
        return torch.device(*self._build(node.args, where))

    def layout(self, node: PickledObject, where: str) -> torch.layout:
        return LAYOUTS[self._build(node.args, where)[0]]

    def tensor(self, node: PickledObject, where: str) -> torch.Tensor:
        """Build the result of ``_rebuild_tensor``, ``_v2`` (which adds hooks) or ``_v3`` (which adds a dtype)."""
        persistent, offset, size, stride, *rest = node.args
        # After requires_grad and hooks, v3 has the dtype; both versions may end with metadata.
        dtype = None
        if node.constructor.name == "_rebuild_tensor_v3":
            dtype = self._build(rest.pop(2), where)
        if len(rest) > _MAX_OPTIONAL_ARGUMENTS:
            raise ValueError(f"it has {len(node.args)} arguments")
        metadata = rest[2] if len(rest) == _MAX_OPTIONAL_ARGUMENTS else None
        storage, own_dtype = self._storage(persistent)
        tensor = strided_tensor(
            storage, dtype or own_dtype, offset, self._build(size, where), self._build(stride, where)
        )
        expanded = tensor.numel() * tensor.element_size() - storage.nbytes()
        self._expanded_bytes += max(0, expanded)
        if self._expanded_bytes > self._reader.size + _MAX_EXPANDED_BYTES:
            raise CheckpointDamagedError(f"{where}: its expanded tensors would be much larger than the file.")
        return self._with_metadata(tensor, metadata, where)

    def _with_metadata(self, tensor: torch.Tensor, node: Any, where: str) -> torch.Tensor:
        """Apply the metadata of a tensor: torch saves lazy conjugation and negation as flags."""
        metadata = self._build(node, where) if node is not None else {}
        if not isinstance(metadata, dict):
            raise TypeError(f"its metadata has type {type(metadata).__name__}; expected a dict")
        unknown = sorted(printable(key) for key in metadata.keys() - {"conj", "neg"})
        if unknown:
            raise CheckpointError(
                f"{where} is a tensor with unsupported metadata ({', '.join(unknown)}), without which its values could "
                "be wrong. Save a plain copy of the tensor (tensor.clone()) where the file was written."
            )
        if not all(isinstance(flag, bool) for flag in metadata.values()):
            raise TypeError("a flag in its metadata is not a bool")
        if metadata.get("conj"):
            if not tensor.is_complex():
                raise ValueError(f"a tensor of dtype {tensor.dtype} has no conjugate")
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if metadata.get("neg") else tensor

    def parameter(self, node: PickledObject, where: str) -> Any:
        return self._build(node.args[0], where)

    def tensor_with_attributes(self, node: PickledObject, where: str) -> Any:
        rebuild, kind, args, _ = node.args
        if str(kind) not in _TENSOR_CLASSES:
            raise UnsupportedObjectError(
                f"{where} is a tensor of the class {printable(str(kind))}, which is not imported."
            )
        return self._build(PickledObject(rebuild, args), where)

    def meta_tensor(self, node: PickledObject, where: str) -> torch.Tensor:
        dtype, size, stride, *_ = self._build(node.args, where)
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def sparse(self, node: PickledObject, where: str) -> torch.Tensor:
        layout, data = self._build(node.args, where)
        return sparse_tensor(layout, data)

    def _storage(self, persistent: Any) -> tuple[torch.UntypedStorage, torch.dtype]:
        """Return a tensor's storage, on the target device, and the dtype of the storage."""
        if not isinstance(persistent, PersistentId):
            raise TypeError("its storage is not a reference to a record of the file")
        tag, kind, key, _, numel = persistent.identity
        dtype = DTYPES.get(f"{kind}") if isinstance(kind, PickledGlobal) else None
        if tag != "storage" or dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError(f"its storage has the unsupported class {kind}")
        length = numel * dtype.itemsize
        if key not in self._memory:
            self._memory[key] = self._read(key, length)
        if self._memory[key].nbytes() != length:
            raise ValueError(
                f"its storage {key!r} has {length} bytes for this tensor but a different size for another tensor"
            )
        return self._memory[key], dtype

    def _read(self, key: str, length: int) -> torch.UntypedStorage:
        if self._device.type == "meta":
            return torch.UntypedStorage(length, device="meta")
        storage = self._reader.storage(key, length)
        if self._device.type == "cpu":
            return storage
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (length,), (1,))
        return whole.to(self._device).untyped_storage()


_TENSORS: dict[str, Callable[[ValueBuilder, PickledObject, str], Any]] = {
    "torch._utils._rebuild_tensor": ValueBuilder.tensor,
    "torch._utils._rebuild_tensor_v2": ValueBuilder.tensor,
    "torch._utils._rebuild_tensor_v3": ValueBuilder.tensor,
    "torch._utils._rebuild_parameter": ValueBuilder.parameter,
    "torch._utils._rebuild_parameter_with_state": ValueBuilder.parameter,
    "torch._tensor._rebuild_from_type_v2": ValueBuilder.tensor_with_attributes,
    "torch._utils._rebuild_meta_tensor_no_storage": ValueBuilder.meta_tensor,
    "torch._utils._rebuild_sparse_tensor": ValueBuilder.sparse,
}
_BUILDERS: dict[str, Callable[[ValueBuilder, PickledObject, str], Any]] = {
    **_TENSORS,
    **dict.fromkeys(_DICTS, ValueBuilder.dictionary),
    # Python 3 writes protocol 2 with Python 2 names.
    **{
        f"{module}.{name}": ValueBuilder.collection
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset")
    },
    "torch.Size": ValueBuilder.collection,
    "torch.device": ValueBuilder.device,
    "torch.serialization._get_layout": ValueBuilder.layout,
    "_codecs.encode": ValueBuilder.bytes_value,
    "__builtin__.bytes": ValueBuilder.bytes_value,
    "builtins.complex": ValueBuilder.complex_number,
    "__builtin__.complex": ValueBuilder.complex_number,
    **{f"numpy.{core}.multiarray.scalar": ValueBuilder.number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": ValueBuilder.array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": ValueBuilder.array_from_buffer for core in ("core", "_core")},
}


def is_tensor(node: Any) -> bool:
    """Return whether a node is a tensor or the placeholder of a tensor."""
    return isinstance(node, torch.Tensor) or (isinstance(node, PickledObject) and node.qualified_name in _TENSORS)


def mapping_items(node: Any) -> dict[Any, Any] | None:
    """Return a mapping from keys to nodes for a dict or its placeholder, otherwise None. No values are built."""
    if isinstance(node, dict):
        return dict(node)
    if isinstance(node, PickledObject) and node.qualified_name in _DICTS:
        return dict(node.pairs)
    return None


def printable(value: Any) -> str:
    """Return a value from a file in printable form for error messages: shortened, without control characters."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"  # Python raises an error when very large integers are printed.
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
