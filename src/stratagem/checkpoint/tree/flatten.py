"""Flatten a state tree of nested dicts and lists to tensors and JSON, and restore it.

A state tree contains tensors, numbers, strings, None, lists, tuples, dicts, sets of integers or strings, and NumPy
arrays. Other types are rejected, because they could not be loaded without executing code from the file. Instances of
subclasses and NumPy scalars are restored as the plain types.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.errors import CheckpointDamagedError, CheckpointError
from stratagem.tensors.dtensor import is_sharded
from stratagem.utils.printable import printable_name

__all__ = [
    "StateTree",
    "StoredTensor",
    "TreePath",
    "unflatten_tree",
    "flatten_state",
    "flatten_tree",
    "module_versions",
    "plain_leaves",
    "tensor_paths",
    "with_versions",
]

StateTree = dict[str, Any]
StoredTensor = Tensor | ShardedTensorState
# The keys of dicts as strings, and the indices of lists and tuples.
TreePath = tuple[str | int, ...]

# A dict with one of these as its only key represents a value that JSON does not support.
_TENSOR, _TUPLE, _FLOAT, _ITEMS, _SET = "$tensor", "$tuple", "$float", "$items", "$set"
_VERSIONED, _ARRAY, _VIEWED = "$versioned", "$array", "$viewed"
# A mapping from dtypes that safetensors lacks to the dtypes of the views that are stored instead. A view of a complex
# tensor has an additional last dimension of size 2.
_VIEWED_AS = {
    torch.complex128: torch.float64,
    torch.complex32: torch.float16,
    torch.float8_e8m0fnu: torch.uint8,
    torch.float4_e2m1fn_x2: torch.uint8,
}
_DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in _VIEWED_AS}
_INTEGERS = {
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
_LAYOUTS = {"torch.strided", *(f"torch.sparse_{kind}" for kind in ("coo", "csr", "csc", "bsr", "bsc"))}
# safetensors stores metadata under this key.
_RESERVED = "__metadata__"


def flatten_tree(tree: Any, *, where: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a tree by path (keys joined by ``/``), and everything else as JSON.

    ``where`` is the name of the root in error messages.

    Raises:
        CheckpointError: if a value has an unsupported type; the message contains its path.
    """
    stored, skeleton = flatten_state(tree, where=where)
    for name, tensor in stored.items():
        if isinstance(tensor, ShardedTensorState):
            raise CheckpointError(
                f"The checkpoint's {_shown(where, name)} is {tensor!r}, which can only be stored if all its ranks take "
                "part in the save."
            )
    return cast("dict[str, Tensor]", stored), skeleton


def flatten_state(tree: Any, *, where: str = "") -> tuple[dict[str, StoredTensor], Any]:
    """Flatten a tree that may contain :class:`ShardedTensorState`, like :func:`flatten_tree`.

    Raises:
        CheckpointError: if a value has an unsupported type; the message contains its path.
    """
    tensors: dict[str, StoredTensor] = {}
    try:
        return tensors, _flatten(tree, "", tensors, where)
    except RecursionError as error:
        raise CheckpointError(
            f"The checkpoint's {where or 'root'} contains a reference to itself or is nested too deeply."
        ) from error


def _flatten(node: Any, path: str, tensors: dict[str, StoredTensor], where: str) -> Any:
    if isinstance(node, Tensor):
        return _flatten_tensor(node, path, tensors, where)
    if isinstance(node, ShardedTensorState):
        name = _free_name(path, tensors)
        tensors[name] = node
        return {_TENSOR: name}
    if isinstance(node, np.generic | np.ndarray):
        return _flatten_numpy(node, path, tensors, where)
    if node is None or isinstance(node, int | str):
        return _plain(node)
    if isinstance(node, float):
        return float(node) if math.isfinite(node) else {_FLOAT: repr(float(node))}
    if isinstance(node, tuple):
        return {_TUPLE: [_flatten(item, _below(path, index), tensors, where) for index, item in enumerate(node)]}
    if isinstance(node, list):
        return [_flatten(item, _below(path, index), tensors, where) for index, item in enumerate(node)]
    if isinstance(node, set) and all(type(item) in {int, str} for item in node):
        return {_SET: sorted(node, key=repr)}
    if isinstance(node, Mapping):
        return _flatten_mapping(node, path, tensors, where)
    raise _cannot_store(node, path, where)


def _cannot_store(node: Any, path: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's {_shown(where, path)} is {type(node).__name__} {_shorten(node)}, which cannot be stored "
        "without pickle. Convert it to tensors, numbers, strings, lists and dicts first, as a state_dict does."
    )


def _flatten_tensor(node: Tensor, path: str, tensors: dict[str, StoredTensor], where: str) -> Any:
    """Flatten a tensor. If safetensors lacks its dtype, store a view with another dtype."""
    kind = _unsupported_kind(node)
    if kind is not None:
        raise CheckpointError(
            f"The checkpoint's {_shown(where, path)} is a tensor {kind}, which cannot be stored. Convert it first."
        )
    name = _free_name(path, tensors)
    # Lazy conjugation and negation are flags on the memory; store the actual values.
    values = node.detach().resolve_conj().resolve_neg()
    if node.dtype not in _VIEWED_AS or is_sharded(node) or node.layout != torch.strided:
        tensors[name] = values
        return {_TENSOR: name}
    tensors[name] = torch.view_as_real(values) if node.is_complex() else values.view(_VIEWED_AS[node.dtype])
    return {_VIEWED: [name, str(node.dtype).removeprefix("torch.")]}


def _unsupported_kind(tensor: Tensor) -> str | None:
    """Return the reason that no format can store a tensor, as a phrase for the error message; None if it can be stored."""
    if tensor.is_meta:
        return "on the meta device"
    if tensor.is_quantized or tensor.is_nested:
        return f"of the class {'quantized' if tensor.is_quantized else 'nested'}"
    if str(tensor.layout) not in _LAYOUTS:
        return f"with layout {tensor.layout}"
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype in _INTEGERS:
        return None
    return f"with dtype {tensor.dtype}"


def _flatten_numpy(
    node: np.generic[Any] | np.ndarray[Any, Any], path: str, tensors: dict[str, StoredTensor], where: str
) -> Any:
    """Flatten a scalar as a plain number or string, and an array as a tensor."""
    if isinstance(node, np.generic):
        plain = node.item()
        if isinstance(plain, bool | int | float | str):
            return _flatten(plain, path, tensors, where)
        raise _cannot_store(node, path, where)
    try:
        values = torch.from_numpy(np.array(node, dtype=node.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError):  # Torch has no such dtype.
        raise _cannot_store(node, path, where) from None
    name = _free_name(path, tensors)
    tensors[name] = values
    return {_ARRAY: name}


def _flatten_mapping(node: Mapping[Any, Any], path: str, tensors: dict[str, StoredTensor], where: str) -> Any:
    for key in node:
        if not isinstance(key, str | int | float) or (isinstance(key, float) and not math.isfinite(key)):
            raise CheckpointError(
                f"The checkpoint's {_shown(where, path)} has the key {_shorten(key)}, which cannot be stored without "
                "pickle. Use strings or numbers as keys."
            )
    items = [(_plain(key), _flatten(value, _below(path, key), tensors, where)) for key, value in node.items()]
    named = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
    skeleton = dict(items) if named else {_ITEMS: [[key, value] for key, value in items]}
    versions = module_versions(node)
    if versions is None:
        return skeleton
    return {_VERSIONED: [skeleton, _flatten(versions, _below(path, "_metadata"), tensors, where)]}


def unflatten_tree(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Restore a tree from the result of :func:`flatten_tree`.

    Raises:
        CheckpointDamagedError: if a referenced tensor is missing or the JSON is malformed.
    """
    try:
        return _unflatten(tensors, skeleton)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointDamagedError(f"The JSON description of the state tree is malformed: {error}.") from error


def _unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    if isinstance(skeleton, list):
        return [_unflatten(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if len(skeleton) == 1:
        (key, value), *_ = skeleton.items()
        if key in (_TENSOR, _ARRAY):
            if value not in tensors:
                raise CheckpointDamagedError(f"The tensor {value!r} is missing.")
            return tensors[value] if key == _TENSOR else tensors[value].numpy(force=True)
        if key == _VIEWED:
            return _from_view(tensors, *value)
        if key == _FLOAT:
            return float(value)
        if key == _SET:
            return set(value)
        if key == _TUPLE:
            return tuple(_unflatten(tensors, item) for item in value)
        if key == _ITEMS:
            return {name: _unflatten(tensors, item) for name, item in value}
        if key == _VERSIONED:
            inner, versions = value
            return with_versions(_unflatten(tensors, inner), _unflatten(tensors, versions))
    return {key: _unflatten(tensors, value) for key, value in skeleton.items()}


def _from_view(tensors: Mapping[str, Tensor], name: str, dtype_name: str) -> Tensor:
    dtype = _DTYPES_BY_NAME.get(dtype_name)
    if dtype is None or name not in tensors:
        raise CheckpointDamagedError(f"The tensor {name!r} with dtype {dtype_name} is missing.")
    stored = tensors[name]
    if stored.dtype != _VIEWED_AS[dtype]:
        raise CheckpointDamagedError(f"The tensor {name!r} has dtype {stored.dtype}, which cannot be read as {dtype}.")
    return torch.view_as_complex(stored.contiguous()) if dtype.is_complex else stored.view(dtype)


def tensor_paths(skeleton: Any) -> dict[str, TreePath]:
    """Return a mapping from tensor names to paths in the tree, given the JSON from :func:`flatten_tree`."""
    found = {}
    for path, node, key in _leaves(skeleton, ()):
        if key is not None:
            found[node[key][0] if key == _VIEWED else node[key]] = path
    return found


def plain_leaves(skeleton: Any) -> Iterator[tuple[TreePath, Any]]:
    """Yield the path and value of each leaf other than a tensor, given the JSON from :func:`flatten_tree`."""
    for path, node, key in _leaves(skeleton, ()):
        if key is None:
            yield path, unflatten_tree({}, node)


def _leaves(node: Any, path: TreePath) -> Iterator[tuple[TreePath, Any, str | None]]:
    """Yield the path, the JSON and the tensor marker (None for other values) of each leaf. A list of plain values is a leaf."""
    if not isinstance(node, dict | list):
        yield path, node, None
        return
    key: str | None
    value: Any
    key, value = next(iter(node.items())) if isinstance(node, dict) and len(node) == 1 else (None, None)
    if key in (_TENSOR, _ARRAY, _VIEWED):
        yield path, node, key
    elif key == _VERSIONED:
        yield from _leaves(value[0], path)
    elif key in (_FLOAT, _SET) or ((isinstance(node, list) or key == _TUPLE) and _is_plain_list(node)):
        yield path, node, None
    elif isinstance(node, list) or key == _TUPLE:
        for index, item in enumerate(node if isinstance(node, list) else value):
            yield from _leaves(item, (*path, index))
    else:
        for name, item in value if key == _ITEMS else node.items():
            yield from _leaves(item, (*path, str(name)))


def _is_plain_list(node: Any) -> bool:
    """Return whether JSON describes a list or tuple that contains neither tensors nor dicts, at any depth."""
    if isinstance(node, list):
        return all(_is_plain_list(item) for item in node)
    if isinstance(node, dict):
        return len(node) == 1 and (node.keys() <= {_FLOAT, _SET} or (_TUPLE in node and _is_plain_list(node[_TUPLE])))
    return True


def _plain(value: Any) -> Any:
    """Convert a str, int or float subclass, such as an enum or a NumPy float, to the plain type."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _free_name(path: str, tensors: Mapping[str, StoredTensor]) -> str:
    """Make a path unique by appending ``'``, for example in ``{"a/b": x, "a": {"b": y}}`` and ``{1: x, "1": y}``."""
    while path in tensors or path == _RESERVED:
        path += "'"
    return path


def _below(path: str, key: object) -> str:
    return "/".join(str(part) for part in (path, key) if part != "") or "root"


def _shown(path: str, key: object) -> str:
    return printable_name(_below(path, key))


def _shorten(value: object, max_length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= max_length else f"{text[:max_length]}..."


def module_versions(state: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Return module name -> torch's metadata (its ``version``), or None if ``state`` is not the state dict of a module.

    A module whose state format has changed reads its version while loading and converts older state. Without the
    version, it would treat a new state as an old one.
    """
    versions = getattr(state, "_metadata", None)
    return dict(versions) if isinstance(versions, Mapping) else None


def with_versions(entries: Mapping[Any, Any], versions: Mapping[str, Any] | None) -> dict[Any, Any]:
    """Return a copy of ``entries`` with the versions attached, as in torch's state dicts."""
    if versions is None:
        return dict(entries)
    state = OrderedDict(entries)
    state._metadata = dict(versions)  # type: ignore[attr-defined]  # where torch stores it
    return state
