"""State as nested dicts and lists, taken apart into tensors and JSON, and put together again.

What goes into a checkpoint is made of tensors, numbers, strings, None, lists, tuples, dicts, and sets of whole numbers
or strings. Nothing else is needed to continue a run, and nothing else could be read back without running code that a
file chose. Subclasses of these come back as the plain types.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.errors import CheckpointDamagedError, CheckpointError

__all__ = [
    "StateTree",
    "StoredTensor",
    "unflatten_tree",
    "flatten_state",
    "flatten_tree",
    "module_versions",
    "with_versions",
]

StateTree = dict[str, Any]
StoredTensor = Tensor | ShardedTensorState

# A dict with one of these as its only key stands in JSON for what JSON cannot say.
_TENSOR, _TUPLE, _FLOAT, _ITEMS, _SET = "$tensor", "$tuple", "$float", "$items", "$set"
_VERSIONED = "$versioned"
# safetensors keeps its own notes under this key.
_RESERVED = "__metadata__"


def flatten_tree(tree: Any, *, where: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a tree by their path (parts joined by ``/``), and JSON for all the rest.

    ``where`` is what errors call the tree's root.

    Raises:
        CheckpointError: if a value is none of the kinds above; it names the path.
    """
    stored, skeleton = flatten_state(tree, where=where)
    for name, tensor in stored.items():
        if isinstance(tensor, ShardedTensorState):
            raise CheckpointError(
                f"The checkpoint's {_below(where, name)} is {tensor!r}: only its ranks together can store it."
            )
    return cast("dict[str, Tensor]", stored), skeleton


def flatten_state(tree: Any, *, where: str = "") -> tuple[dict[str, StoredTensor], Any]:
    """Do as :func:`flatten_tree` with the state of a run that its ranks save together, which may be in pieces.

    Raises:
        CheckpointError: if a value is none of the kinds above, nor :class:`ShardedTensorState`; it names the path.
    """
    tensors: dict[str, StoredTensor] = {}
    try:
        return tensors, _split(tree, "", tensors, where)
    except RecursionError as error:
        raise CheckpointError(
            f"The checkpoint's {where or 'root'} contains itself, or is nested too deeply to be stored."
        ) from error


def _split(node: Any, path: str, tensors: dict[str, StoredTensor], where: str) -> Any:
    if isinstance(node, Tensor | ShardedTensorState):
        name = _free_name(path, tensors)
        # A lazy conjugate or negative is a flag on memory that holds other numbers: store the numbers themselves.
        tensors[name] = node.detach().resolve_conj().resolve_neg() if isinstance(node, Tensor) else node
        return {_TENSOR: name}
    if node is None or isinstance(node, int | str):
        return _plain(node)
    if isinstance(node, float):
        return float(node) if math.isfinite(node) else {_FLOAT: repr(float(node))}
    if isinstance(node, tuple):
        return {_TUPLE: [_split(item, _below(path, index), tensors, where) for index, item in enumerate(node)]}
    if isinstance(node, list):
        return [_split(item, _below(path, index), tensors, where) for index, item in enumerate(node)]
    if isinstance(node, set) and all(type(item) in {int, str} for item in node):
        return {_SET: sorted(node, key=repr)}
    if isinstance(node, Mapping):
        return _split_mapping(node, path, tensors, where)
    raise CheckpointError(
        f"The checkpoint's {_below(where, path)} is {type(node).__name__} {_shorten(node)}, which cannot be stored "
        "without pickle. Turn it into tensors, numbers, strings, lists and dicts first (a state_dict does)."
    )


def _split_mapping(node: Mapping[Any, Any], path: str, tensors: dict[str, StoredTensor], where: str) -> Any:
    for key in node:
        if not isinstance(key, str | int | float) or (isinstance(key, float) and not math.isfinite(key)):
            raise CheckpointError(
                f"The checkpoint's {_below(where, path)} has the key {_shorten(key)}, which cannot be stored without "
                "pickle. Use strings or numbers as keys."
            )
    items = [(_plain(key), _split(value, _below(path, key), tensors, where)) for key, value in node.items()]
    named = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
    skeleton = dict(items) if named else {_ITEMS: [[key, value] for key, value in items]}
    versions = module_versions(node)
    if versions is None:
        return skeleton
    return {_VERSIONED: [skeleton, _split(versions, _below(path, "_metadata"), tensors, where)]}


def unflatten_tree(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Put together again what :func:`flatten_tree` took apart.

    Raises:
        CheckpointDamagedError: if a tensor that the JSON names is not there, or the JSON says what we never write.
    """
    try:
        return _join(tensors, skeleton)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointDamagedError(f"The description of the tree is not one of ours: {error}.") from error


def _join(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    if isinstance(skeleton, list):
        return [_join(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if len(skeleton) == 1:
        (key, value), *_ = skeleton.items()
        if key == _TENSOR:
            if value not in tensors:
                raise CheckpointDamagedError(f"The tensor {value!r} is missing.")
            return tensors[value]
        if key == _FLOAT:
            return float(value)
        if key == _SET:
            return set(value)
        if key == _TUPLE:
            return tuple(_join(tensors, item) for item in value)
        if key == _ITEMS:
            return {name: _join(tensors, item) for name, item in value}
        if key == _VERSIONED:
            inner, versions = value
            return with_versions(_join(tensors, inner), _join(tensors, versions))
    return {key: _join(tensors, value) for key, value in skeleton.items()}


def _plain(value: Any) -> Any:
    """Return a key, string or number as exactly that: an enum or NumPy's float is read back by pickle alone."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _free_name(path: str, tensors: Mapping[str, StoredTensor]) -> str:
    """Return the path, marked where another tensor has it: ``{"a/b": x, "a": {"b": y}}``, ``{1: x, "1": y}``."""
    while path in tensors or path == _RESERVED:
        path += "'"
    return path


def _below(path: str, key: object) -> str:
    return "/".join(str(part) for part in (path, key) if part != "") or "root"


def _shorten(value: object, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def module_versions(state: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Return module name -> what torch notes of it (its ``version``), or None for what is no module's state dict."""
    versions = getattr(state, "_metadata", None)
    return dict(versions) if isinstance(versions, Mapping) else None


def with_versions(entries: Mapping[Any, Any], versions: Mapping[str, Any] | None) -> dict[Any, Any]:
    """Return a new dict of the entries that carries the versions as torch's own state dicts do."""
    if versions is None:
        return dict(entries)
    state = OrderedDict(entries)
    state._metadata = dict(versions)  # type: ignore[attr-defined]  # where torch looks for it
    return state
