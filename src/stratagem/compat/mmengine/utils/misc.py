"""Small functions on sequences, types, imports and deprecated names."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import logging
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.errors import ConfigTypeError, ConfigValueError, MissingDependencyError
from stratagem.utils import import_object

__all__ = [
    "apply_to",
    "check_prerequisites",
    "concat_list",
    "deprecated_api_warning",
    "deprecated_function",
    "get_object_from_string",
    "has_method",
    "import_modules_from_strings",
    "is_list_of",
    "is_method_overridden",
    "is_seq_of",
    "is_str",
    "is_tuple_of",
    "iter_cast",
    "list_cast",
    "requires_executable",
    "requires_package",
    "slice_list",
    "to_1tuple",
    "to_2tuple",
    "to_3tuple",
    "to_4tuple",
    "to_ntuple",
    "tuple_cast",
]


def to_ntuple(n: int) -> Callable[[Any], Any]:
    """Return a function that repeats a value ``n`` times in a tuple, and returns an iterable unchanged."""

    def repeat(value: Any) -> Any:
        return value if isinstance(value, Iterable) else (value,) * n

    return repeat


_ntuple = to_ntuple
to_1tuple = to_ntuple(1)
to_2tuple = to_ntuple(2)
to_3tuple = to_ntuple(3)
to_4tuple = to_ntuple(4)


def is_str(x: object) -> bool:
    """Return whether ``x`` is a string."""
    return isinstance(x, str)


def import_modules_from_strings(imports: Any, allow_failed_imports: bool = False) -> Any:
    """Import the named modules.

    Args:
        imports: a module name, or a list of them; nothing is imported if it is empty or None.
        allow_failed_imports: whether a module that cannot be imported is None in the result, with a warning.

    Returns:
        The module for a name, a list of modules for a list, None for nothing.

    Raises:
        TypeError: if ``imports`` is neither a name nor a list of names.
        ImportError: if a module cannot be imported.
    """
    if not imports:
        return None
    names = [imports] if isinstance(imports, str) else imports
    if not isinstance(names, list):
        raise ConfigTypeError(f"The modules to import must be a string or a list of strings, got {imports!r}.")
    modules: list[ModuleType | None] = []
    for name in names:
        if not isinstance(name, str):
            raise ConfigTypeError(f"The name of a module to import must be a string, got {name!r}.")
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            if not allow_failed_imports:
                raise MissingDependencyError(f"The module {name} cannot be imported: {error}") from error
            warnings.warn(f"The module {name} cannot be imported and is skipped: {error}", stacklevel=2)
            modules.append(None)
    return modules[0] if isinstance(imports, str) else modules


def iter_cast(inputs: Iterable[Any], dst_type: type, return_type: type | None = None) -> Any:
    """Convert each item to ``dst_type``; return an iterator, or a ``return_type`` of the items.

    Raises:
        TypeError: if ``inputs`` is not iterable or ``dst_type`` is not a class.
    """
    if not isinstance(inputs, Iterable):
        raise ConfigTypeError(f"The inputs must be iterable, got {inputs!r}.")
    if not isinstance(dst_type, type):
        raise ConfigTypeError(f"dst_type must be a class, got {dst_type!r}.")
    items: Iterator[Any] = map(dst_type, inputs)
    return items if return_type is None else return_type(items)


def list_cast(inputs: Iterable[Any], dst_type: type) -> list[Any]:
    """Return a list of the items, each converted to ``dst_type``."""
    items: list[Any] = iter_cast(inputs, dst_type, return_type=list)
    return items


def tuple_cast(inputs: Iterable[Any], dst_type: type) -> tuple[Any, ...]:
    """Return a tuple of the items, each converted to ``dst_type``."""
    items: tuple[Any, ...] = iter_cast(inputs, dst_type, return_type=tuple)
    return items


def is_seq_of(seq: Any, expected_type: type | tuple[type, ...], seq_type: type | None = None) -> bool:
    """Return whether ``seq`` is a sequence (of class ``seq_type``, if given) whose items are all of ``expected_type``."""
    if seq_type is not None:
        require(isinstance(seq_type, type), f"seq_type must be a class, got {seq_type!r}.")
    kind: Any = seq_type or Sequence
    return isinstance(seq, kind) and all(isinstance(item, expected_type) for item in seq)


def is_list_of(seq: Any, expected_type: type | tuple[type, ...]) -> bool:
    """Return whether ``seq`` is a list whose items are all of ``expected_type``."""
    return is_seq_of(seq, expected_type, seq_type=list)


def is_tuple_of(seq: Any, expected_type: type | tuple[type, ...]) -> bool:
    """Return whether ``seq`` is a tuple whose items are all of ``expected_type``."""
    return is_seq_of(seq, expected_type, seq_type=tuple)


def slice_list(in_list: list[Any], lens: int | list[int]) -> list[list[Any]]:
    """Split a list into consecutive parts.

    Args:
        in_list: the list.
        lens: the length of each part, or a list with the length of every part.

    Raises:
        AssertionError: if the list does not consist of parts of the length ``lens``.
        ValueError: if the lengths do not add up to the length of the list.
        TypeError: if ``lens`` is neither a number nor a list.
    """
    if isinstance(lens, int):
        require(len(in_list) % lens == 0, f"A list of {len(in_list)} items cannot be split into parts of {lens} items.")
        lens = [lens] * (len(in_list) // lens)
    if not isinstance(lens, list):
        raise ConfigTypeError(f"lens must be a number or a list of numbers, got {lens!r}.")
    if sum(lens) != len(in_list):
        raise ConfigValueError(f"The lengths {lens} add up to {sum(lens)}, but the list has {len(in_list)} items.")
    items = iter(in_list)
    return [list(itertools.islice(items, length)) for length in lens]


def concat_list(in_list: Iterable[Iterable[Any]]) -> list[Any]:
    """Return the items of all lists in one list."""
    return list(itertools.chain.from_iterable(in_list))


def apply_to(data: Any, expr: Callable[[Any], bool], apply_func: Callable[[Any], Any]) -> Any:
    """Apply a function to the values for which ``expr`` is true, in nested dicts, lists, tuples and named tuples.

    Containers keep their classes; other values are returned unchanged.
    """
    if isinstance(data, dict):
        result = type(data)()
        for key, value in data.items():
            result[key] = apply_to(value, expr, apply_func)
        return result
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(apply_to(item, expr, apply_func) for item in data))
    if isinstance(data, list | tuple):
        return type(data)(apply_to(item, expr, apply_func) for item in data)
    return apply_func(data) if expr(data) else data


def check_prerequisites(
    prerequisites: str | Sequence[str],
    checker: Callable[[str], bool],
    msg_tmpl: str = 'Prerequisites "{}" are required in method "{}" but not found, please install them first.',
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that checks requirements when the function is called.

    Args:
        prerequisites: the names of the requirements.
        checker: returns whether a requirement is met.
        msg_tmpl: the message to print, with places for the missing requirements and the name of the function.

    The decorated function raises a ``RuntimeError`` if a requirement is not met.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            names = [prerequisites] if isinstance(prerequisites, str) else prerequisites
            missing = [name for name in names if not checker(name)]
            if missing:
                message = msg_tmpl.format(", ".join(missing), function.__name__)
                print(message)  # noqa: T201 -- the interface of MMEngine
                raise RuntimeError(f"Prerequisites not meet. {message}")
            return function(*args, **kwargs)

        return checked

    return decorate


def _is_importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def requires_package(prerequisites: str | Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator; the function raises a ``RuntimeError`` if a Python package cannot be imported."""
    return check_prerequisites(prerequisites, checker=_is_importable)


def requires_executable(prerequisites: str | Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator; the function raises a ``RuntimeError`` if a program is not on the ``PATH``."""
    return check_prerequisites(prerequisites, checker=lambda name: shutil.which(name) is not None)


def deprecated_api_warning(
    name_dict: dict[str, str], cls_name: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that renames deprecated keyword arguments, with a ``DeprecationWarning``.

    Args:
        name_dict: the old names of arguments and their new names.
        cls_name: the name of the class of a method, for the warning.

    The decorated function raises an ``AssertionError`` if it receives both names.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        shown = function.__name__ if cls_name is None else f"{cls_name}.{function.__name__}"

        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            for old, new in name_dict.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise InvalidArgumentError(
                        f"{shown} received {old!r} and {new!r}. {old!r} is a deprecated name of {new!r}: remove it."
                    )
                warnings.warn(
                    f'"{old}" is deprecated in `{shown}`, please use "{new}" instead', DeprecationWarning, stacklevel=2
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renamed

    return decorate


def is_method_overridden(method: str, base_class: type, derived_class: Any) -> bool:
    """Return whether a class, or the class of an object, replaces a method of its base class.

    Raises:
        AssertionError: if ``base_class`` is not a class.
    """
    require(isinstance(base_class, type), f"base_class must be a class, got the object {base_class!r}.")
    derived = derived_class if isinstance(derived_class, type) else type(derived_class)
    return bool(getattr(derived, method) != getattr(base_class, method))


def has_method(obj: object, method: str) -> bool:
    """Return whether the object has a method with this name."""
    return callable(getattr(obj, method, None))


def deprecated_function(
    since: str, removed_in: str, instructions: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that logs a warning at each call, and adds a note to the start of the docstring.

    Args:
        since: the version in which the function was deprecated.
        removed_in: the version in which it will be removed.
        instructions: what to do instead, starting with a verb.
    """
    note = (
        f".. deprecated:: {since}\n    Deprecated and will be removed in version {removed_in}.\n"
        f"    Please {instructions}.\n\n\n"
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def warned(*args: Any, **kwargs: Any) -> Any:
            import_object("stratagem.compat.mmengine.logging:print_log")(
                f"'{function.__module__}.{function.__name__}' is deprecated in version {since} and will be removed in "
                f"version {removed_in}. Please {instructions}.",
                logger="current",
                level=logging.WARNING,
            )
            return function(*args, **kwargs)

        warned.__doc__ = note + _indented_docstring(function.__doc__ or "")
        return warned

    return decorate


def _indented_docstring(text: str) -> str:
    """Return a docstring with all lines of its text indented by four columns, including the first one."""
    first, newline, rest = text.partition("\n")
    return textwrap.indent(first.strip() + newline + textwrap.dedent(rest), "    ")


def get_object_from_string(obj_name: str) -> Any:
    """Import the object at a dotted path, such as ``torch.optim.sgd.SGD``. Return None if there is none.

    A function of a package takes precedence over a module of the package with the same name.
    """
    first, *rest = obj_name.split(".")
    path = first
    try:
        found: Any = importlib.import_module(path)
        while rest:
            item = getattr(found, rest[0], None)
            if item is not None and not inspect.ismodule(item):
                break
            path = f"{path}.{rest.pop(0)}"
            found = importlib.import_module(path)
    except ImportError:
        return None
    for name in rest:
        found = getattr(found, name, None)
    return found
