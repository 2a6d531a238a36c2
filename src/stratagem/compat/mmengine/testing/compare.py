"""Compare values in tests."""

from __future__ import annotations

import runpy
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from stratagem.compat.mmengine.utils.dl_utils import is_norm

__all__ = [
    "assert_allclose",
    "assert_attrs_equal",
    "assert_dict_contains_subset",
    "assert_dict_has_keys",
    "assert_is_norm_layer",
    "assert_keys_equal",
    "assert_params_all_zeros",
    "check_python_script",
]


def assert_allclose(
    actual: Any,
    expected: Any,
    rtol: float | None = None,
    atol: float | None = None,
    equal_nan: bool = True,
    msg: str | Callable[[str], str] | None = "",
) -> None:
    """Check that values are close, with ``torch.testing.assert_close``.

    Raises:
        AssertionError: if they are not.
    """
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=equal_nan, msg=msg or None)


def check_python_script(cmd: str) -> None:
    """Run a script in this process.

    Args:
        cmd: the script and its arguments; a first word ``python`` is dropped.
    """
    words = shlex.split(cmd)
    words = words[1:] if words[0] == "python" else words
    before, sys.argv = sys.argv, words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before


def assert_dict_contains_subset(dict_obj: Mapping[Any, Any], expected_subset: Mapping[Any, Any]) -> bool:
    """Return whether a dict has all keys of another one, with equal values."""
    return all(key in dict_obj and _is_equal(dict_obj[key], value) for key, value in expected_subset.items())


def assert_attrs_equal(obj: Any, expected_attrs: Mapping[str, Any]) -> bool:
    """Return whether an object has all the attributes, with equal values."""
    return all(hasattr(obj, name) and _is_equal(getattr(obj, name), value) for name, value in expected_attrs.items())


def assert_dict_has_keys(obj: Mapping[str, Any], expected_keys: Iterable[str]) -> bool:
    """Return whether a dict has all the keys."""
    return set(expected_keys) <= set(obj)


def assert_keys_equal(result_keys: Iterable[str], target_keys: Iterable[str]) -> bool:
    """Return whether two collections contain the same keys."""
    return set(result_keys) == set(target_keys)


def assert_is_norm_layer(module: nn.Module) -> bool:
    """Return whether a module is a normalization layer."""
    return is_norm(module)


def assert_params_all_zeros(module: nn.Module) -> bool:
    """Return whether the weight of a module, and its bias if it has one, consist of zeros."""
    values = (getattr(module, "weight"), getattr(module, "bias", None))  # noqa: B009 -- not every module has one
    return all(bool(torch.count_nonzero(value) == 0) for value in values if value is not None)


def _is_equal(value: Any, expected: Any) -> bool:
    """Return whether values are equal in all of their elements."""
    differs = value != expected
    return not _any(differs)


def _any(result: Any) -> bool:
    if isinstance(result, Iterable) and getattr(result, "ndim", 1) > 0:
        return any(_any(item) for item in result)
    return bool(result)
