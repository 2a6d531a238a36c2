"""Helpers for tests."""

from __future__ import annotations

from typing import Any

from stratagem.compat.mmengine.testing.compare import (
    assert_allclose,
    assert_attrs_equal,
    assert_dict_contains_subset,
    assert_dict_has_keys,
    assert_is_norm_layer,
    assert_keys_equal,
    assert_params_all_zeros,
    check_python_script,
)
from stratagem.utils import import_object

__all__ = [
    "RunnerTestCase",
    "assert_allclose",
    "assert_attrs_equal",
    "assert_dict_contains_subset",
    "assert_dict_has_keys",
    "assert_is_norm_layer",
    "assert_keys_equal",
    "assert_params_all_zeros",
    "check_python_script",
]


def __getattr__(name: str) -> Any:
    # Importing it imports the runner and everything that it uses.
    if name == "RunnerTestCase":
        return import_object("stratagem.compat.mmengine.testing.runner_test_case:RunnerTestCase")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
