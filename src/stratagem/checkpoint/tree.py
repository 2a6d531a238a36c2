"""State as nested dicts and lists, taken apart into tensors and JSON, and put together again.

What goes into a checkpoint is made of tensors, numbers, strings, None, lists, tuples, dicts, and sets of whole numbers
or strings. Nothing else is needed to continue a run, and nothing else could be read back without running code that a
file chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stratagem.errors import CheckpointDamagedError, CheckpointError

__all__ = ["StateTree", "join_tree", "split_tree"]

StateTree = dict[str, Any]

# A dict with one of these as its only key stands in JSON for what JSON cannot say.
_TENSOR, _TUPLE, _FLOAT, _ITEMS, _SET = "$tensor", "$tuple", "$float", "$items", "$set"


def split_tree(tree: Any, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a tree by their path (parts joined by ``/``), and JSON for all the rest.

    Raises:
        CheckpointError: if a value is none of the kinds above; it names the path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _split(tree, name, tensors)


def _split(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        tensors[path] = node.detach()
        return {_TENSOR: path}
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, float):
        return node if math.isfinite(node) else {_FLOAT: repr(node)}
    if isinstance(node, tuple):
        return {_TUPLE: [_split(item, _below(path, index), tensors) for index, item in enumerate(node)]}
    if isinstance(node, list):
        return [_split(item, _below(path, index), tensors) for index, item in enumerate(node)]
    if isinstance(node, set) and all(type(item) in (int, str) for item in node):
        return {_SET: sorted(node, key=repr)}
    if isinstance(node, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in node):
            return {key: _split(value, _below(path, key), tensors) for key, value in node.items()}
        if all(isinstance(key, str | int | float | bool) for key in node):
            return {_ITEMS: [[key, _split(value, _below(path, key), tensors)] for key, value in node.items()]}
    raise CheckpointError(
        f"The checkpoint's {path or 'root'} is {type(node).__name__} {_shorten(node)}, which cannot be stored without "
        "pickle. Turn it into tensors, numbers, strings, lists and dicts first (a state_dict does)."
    )


def join_tree(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Put together again what :func:`split_tree` took apart.

    Raises:
        CheckpointDamagedError: if a tensor that the JSON names is not there.
    """
    if isinstance(skeleton, list):
        return [join_tree(tensors, item) for item in skeleton]
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
            return tuple(join_tree(tensors, item) for item in value)
        if key == _ITEMS:
            return {name: join_tree(tensors, item) for name, item in value}
    return {key: join_tree(tensors, value) for key, value in skeleton.items()}


def _below(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def _shorten(value: object, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
