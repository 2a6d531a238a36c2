"""Make tensors and plain values of what a pickle says, and of nothing else.

A record whose maker is in the table below becomes the value that the maker stands for; the functions that do it are
ours, and none imports, looks up or calls what the file names. Every other record stays what it is: asking for its value
is an error that names it.
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
# What may be called a tensor's class without meaning more than a tensor.
_TENSOR_CLASSES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_SPREAD_BYTES = 256 << 20
# Of a tensor's rebuild function after its stride: requires_grad, hooks, metadata.
_MOST_FURTHER_ARGUMENTS = 3


class UnsupportedObjectError(CheckpointError):
    """A value was asked for that only running code of the file's choice could make."""


class StorageReader(Protocol):
    """Where the memory of tensors lies."""

    size: int

    def storage(self, key: str, length: int) -> torch.UntypedStorage:
        """Return the ``length`` bytes that belong to ``key``, on the CPU."""


@final
class ValueBuilder:
    """Turns what a pickle says into values, each once: what the file shares is shared.

    Tensors are on ``device``; their memory is read when their value is asked for.
    """

    def __init__(self, storages: StorageReader, device: torch.device | str = "cpu") -> None:
        self._storages = storages
        self._device = torch.device(device)
        # The keys keep what they stand for alive, so that no other object gets its id.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._under_way: set[int] = set()
        self._memory: dict[str, torch.UntypedStorage] = {}
        self._spread = 0

    def of(self, node: Any, where: str) -> Any:
        """Return the value of ``node``; ``where`` is what errors call it.

        Raises:
            UnsupportedObjectError: if it is, or holds, an object that only running code could make.
            CheckpointDamagedError: if what it says makes no sense.
        """
        try:
            return self._of(node, where)
        except RecursionError as error:
            raise CheckpointDamagedError(f"{where} is nested too deeply.") from error

    def _of(self, node: Any, where: str) -> Any:
        if not isinstance(node, PickledObject | PickledGlobal | PersistentId | dict | list | tuple | set | frozenset):
            return node
        if isinstance(node, PickledGlobal):
            return self._name(node, where)
        known = self._known.get(id(node))
        if known is not None:
            return known[1]
        if id(node) in self._under_way:
            raise CheckpointDamagedError(f"{where} contains itself.")
        self._under_way.add(id(node))
        try:
            value = self._make(node, where)
        finally:
            self._under_way.discard(id(node))
        self._known[id(node)] = (node, value)
        return value

    def _make(self, node: Any, where: str) -> Any:
        try:
            return self._record(node, where) if isinstance(node, PickledObject) else self._container(node, where)
        except (CheckpointError, RecursionError):
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            kind = printable(node.kind) if isinstance(node, PickledObject) else type(node).__name__
            raise CheckpointDamagedError(f"{where} makes no sense as {kind}: {_line(error)}") from error

    def _container(self, node: Any, where: str) -> Any:
        if isinstance(node, PersistentId):
            raise UnsupportedObjectError(f"{where} is the bare memory of a tensor, not a tensor.")
        if isinstance(node, dict):
            return dict(self._entries(node.items(), where))
        if isinstance(node, list | tuple):
            items = [self._of(item, f"{where}/{index}") for index, item in enumerate(node)]
            return items if isinstance(node, list) else tuple(items)
        return type(node)(self._of(item, where) for item in node)

    def _record(self, node: PickledObject, where: str) -> Any:
        maker = _MAKERS.get(node.kind) if isinstance(node.maker, PickledGlobal) else None
        if maker is None:
            kind = printable(node.kind)
            raise UnsupportedObjectError(f"{where} is an object of {kind}, which only running code could make.")
        return maker(self, node, where)

    def _entries(self, pairs: Any, where: str) -> Iterator[tuple[Any, Any]]:
        for key, value in pairs:
            name = self._of(key, f"a key of {where}")
            if not isinstance(name, str | bytes | int | float | tuple | type(None)):
                raise CheckpointDamagedError(f"{where} has a {type(name).__name__} as a key.")
            yield name, self._of(value, f"{where}/{printable(name)}")

    def _name(self, node: PickledGlobal, where: str) -> Any:
        if str(node) in DTYPES:
            return DTYPES[str(node)]
        raise UnsupportedObjectError(f"{where} is {printable(str(node))}, a class or function, which is not looked up.")

    # ---- makers: each reads the arguments that it needs, and leaves hooks and the like alone

    def dictionary(self, node: PickledObject, where: str) -> dict[Any, Any]:
        entries: OrderedDict[Any, Any] = OrderedDict()
        # The first argument of a defaultdict is a function; of the others, what they begin with.
        if node.args and node.kind != "collections.defaultdict":
            (given,) = self._of(node.args, where)
            entries.update(given)
        entries.update(self._entries(node.pairs, where))
        if node.kind != "collections.OrderedDict":
            return dict(entries)
        versions = node.state.get("_metadata") if isinstance(node.state, dict) else None
        if versions is None:
            return entries
        return with_versions(entries, self._of(versions, f"{where}/_metadata"))

    def collection(self, node: PickledObject, where: str) -> Any:
        kind = {"set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "Size": torch.Size}[node.maker.name]
        (items,) = self._of(node.args, where) if node.args else ((),)
        return kind(items)

    def octets(self, node: PickledObject, where: str) -> bytes:
        if not node.args:
            return b""  # which Python 3 writes as a call of bytes
        text, encoding = self._of(node.args, where)
        if encoding not in {"latin1", "latin-1"}:
            raise ValueError(f"its encoding is {encoding!r}")
        return str.encode(text, "latin-1")

    def complex_number(self, node: PickledObject, where: str) -> complex:
        real, imaginary = self._of(node.args, where)
        return complex(real, imaginary)

    def number(self, node: PickledObject, where: str) -> Any:
        dtype, data = node.args
        return scalar_of(dtype, self._of(data, where))

    def array(self, node: PickledObject, where: str) -> Any:
        kind = node.args[0]
        if str(kind) != "numpy.ndarray":
            raise UnsupportedObjectError(
                f"{where} is an array of the class {printable(str(kind))}, which is not looked up."
            )
        return array_of(self._of(node.state[1], where), node.state[2], node.state[3], self._of(node.state[4], where))

    def array_in_band(self, node: PickledObject, where: str) -> Any:
        data, dtype, shape, order = node.args
        return array_from_bytes(self._of(data, where), dtype, self._of(shape, where), order)

    def device(self, node: PickledObject, where: str) -> torch.device:
        return torch.device(*self._of(node.args, where))

    def layout(self, node: PickledObject, where: str) -> torch.layout:
        return LAYOUTS[self._of(node.args, where)[0]]

    def tensor(self, node: PickledObject, where: str) -> torch.Tensor:
        """``_rebuild_tensor``, and ``_v2`` with hooks, and ``_v3`` with a dtype that no storage has."""
        persistent, offset, size, stride, *rest = node.args
        # After requires_grad and the hooks: v3 has the dtype, and both may end with metadata.
        dtype = None
        if node.maker.name == "_rebuild_tensor_v3":
            dtype = self._of(rest.pop(2), where)
        if len(rest) > _MOST_FURTHER_ARGUMENTS:
            raise ValueError(f"it has {len(node.args)} arguments")
        metadata = rest[2] if len(rest) == _MOST_FURTHER_ARGUMENTS else None
        storage, own_dtype = self._storage(persistent)
        tensor = strided_tensor(storage, dtype or own_dtype, offset, self._of(size, where), self._of(stride, where))
        spread = tensor.numel() * tensor.element_size() - storage.nbytes()
        self._spread += max(0, spread)
        if self._spread > self._storages.size + _SPREAD_BYTES:
            raise CheckpointDamagedError(f"{where}: its tensors spread few bytes over far more than the file has.")
        return self._with_metadata(tensor, metadata, where)

    def _with_metadata(self, tensor: torch.Tensor, node: Any, where: str) -> torch.Tensor:
        """Return the tensor that memory and metadata stand for: torch saves lazy conjugates and negatives as flags."""
        metadata = self._of(node, where) if node is not None else {}
        if not isinstance(metadata, dict):
            raise TypeError(f"its metadata is {type(metadata).__name__}, not a dict")
        unknown = sorted(printable(key) for key in metadata.keys() - {"conj", "neg"})
        if unknown:
            raise CheckpointError(
                f"{where} is a tensor with the metadata {', '.join(unknown)}, which is not read: without it the numbers could "
                "be wrong. Save a plain copy of the tensor (tensor.clone()) where the file was made."
            )
        if not all(isinstance(flag, bool) for flag in metadata.values()):
            raise TypeError("a flag in its metadata is not a bool")
        if metadata.get("conj"):
            if not tensor.is_complex():
                raise ValueError(f"a tensor of {tensor.dtype} has no conjugate")
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if metadata.get("neg") else tensor

    def parameter(self, node: PickledObject, where: str) -> Any:
        return self._of(node.args[0], where)

    def tensor_with_attributes(self, node: PickledObject, where: str) -> Any:
        rebuild, kind, args, _ = node.args
        if str(kind) not in _TENSOR_CLASSES:
            raise UnsupportedObjectError(
                f"{where} is a tensor of the class {printable(str(kind))}, which is not looked up."
            )
        return self._of(PickledObject(rebuild, args), where)

    def meta_tensor(self, node: PickledObject, where: str) -> torch.Tensor:
        dtype, size, stride, *_ = self._of(node.args, where)
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def sparse(self, node: PickledObject, where: str) -> torch.Tensor:
        layout, data = self._of(node.args, where)
        return sparse_tensor(layout, data)

    def _storage(self, persistent: Any) -> tuple[torch.UntypedStorage, torch.dtype]:
        """Return a tensor's memory and the type that its storage has; on a device other than the CPU it is moved there."""
        if not isinstance(persistent, PersistentId):
            raise TypeError("its memory is no reference to the file's records")
        tag, kind, key, _, numel = persistent.identity
        dtype = DTYPES.get(f"{kind}") if isinstance(kind, PickledGlobal) else None
        if tag != "storage" or dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError(f"its memory is of the kind {kind}")
        length = numel * dtype.itemsize
        if key not in self._memory:
            self._memory[key] = self._read(key, length)
        if self._memory[key].nbytes() != length:
            raise ValueError(f"its memory {key!r} is said to have {length} bytes here and another number elsewhere")
        return self._memory[key], dtype

    def _read(self, key: str, length: int) -> torch.UntypedStorage:
        if self._device.type == "meta":
            return torch.UntypedStorage(length, device="meta")
        storage = self._storages.storage(key, length)
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
_MAKERS: dict[str, Callable[[ValueBuilder, PickledObject, str], Any]] = {
    **_TENSORS,
    **dict.fromkeys(_DICTS, ValueBuilder.dictionary),
    # Python 3 writes protocol 2 with the names of Python 2.
    **{
        f"{room}.{name}": ValueBuilder.collection
        for room in ("builtins", "__builtin__")
        for name in ("set", "frozenset")
    },
    "torch.Size": ValueBuilder.collection,
    "torch.device": ValueBuilder.device,
    "torch.serialization._get_layout": ValueBuilder.layout,
    "_codecs.encode": ValueBuilder.octets,
    "__builtin__.bytes": ValueBuilder.octets,
    "builtins.complex": ValueBuilder.complex_number,
    "__builtin__.complex": ValueBuilder.complex_number,
    **{f"numpy.{core}.multiarray.scalar": ValueBuilder.number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": ValueBuilder.array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": ValueBuilder.array_in_band for core in ("core", "_core")},
}


def is_tensor(node: Any) -> bool:
    """Tell whether a node is a tensor, or says that it is one."""
    return isinstance(node, torch.Tensor) or (isinstance(node, PickledObject) and node.kind in _TENSORS)


def mapping_items(node: Any) -> dict[Any, Any] | None:
    """Return key -> node of what is a dict, or says that it is one; else None. Nothing is read."""
    if isinstance(node, dict):
        return dict(node)
    if isinstance(node, PickledObject) and node.kind in _DICTS:
        return dict(node.pairs)
    return None


def printable(value: Any) -> str:
    """Return a name from a file as it may stand in a message: short, and without what steers a terminal."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"  # Python refuses to print the largest
    text = value if isinstance(value, str) else repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
