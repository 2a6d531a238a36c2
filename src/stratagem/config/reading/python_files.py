"""Execute a Python configuration and collect its top-level names."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, TypeGuard, TypeVar, final

from stratagem.config.merge import NO_EDITS, BaseEdits, difference, edits_of, is_same
from stratagem.config.node import ConfigDict, as_plain
from stratagem.config.reading.lazy import HAS_IMPORT, extract_base_imports, extract_imports, imported_names, is_lazy
from stratagem.config.reading.name_uses import NO_USES, NameUses, uses_of
from stratagem.config.reading.placeholders import BaseValues, Placeholders
from stratagem.errors import ConfigParsingError, StratagemError
from stratagem.utils.lazy import lazy_name, resolve

__all__ = ["LoadBases", "PythonFile", "read_python"]

# Loads the files in `_base_` or the imports of a read_base block; returns a function that returns their merged values.
LoadBases = Callable[[object], BaseValues]

T = TypeVar("T")

# Matches _base_, but neither an assignment to it nor a folder of this name in a path.
_READS_BASE = re.compile(r"(?<![/\w'\"])_base_(?![/\w])(?!\s*=[^=])")
_BASE = "_base_"
_BASE_VALUES = "_base_values_"
# Methods of a dict. A file that calls one of them on `_base_` may read any name.
_METHODS_OF_BASE = frozenset(dir(ConfigDict))


@final
@dataclass(frozen=True, slots=True)
class PythonFile:
    """The contents of one Python configuration, before it is merged into its base.

    Attributes:
        data: The top-level values.
        environment: The environment variables that placeholders read.
        modules: The top-level packages that a pure-Python configuration imports lazily.
        base_edits: The changes that the program made to ``_base_``.
        uses: The top-level names that the program reads.
    """

    data: dict[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    base_edits: BaseEdits = NO_EDITS
    uses: NameUses = NO_USES


def read_python(
    text: str,
    name: str,
    load_bases: LoadBases,
    *,
    lazy: bool | None = None,
    environment: bool = True,
    kept: Collection[str] = (),
    as_mmengine: bool = False,
) -> PythonFile:
    """Execute ``text`` and return its public names, except for modules, classes and functions.

    Args:
        text: The program.
        name: The name of the file, for errors.
        load_bases: Loads the bases of the file.
        lazy: Whether the file is a pure-Python configuration; None detects it.
        environment: Whether placeholders may read environment variables.
        kept: The kinds of placeholders that are not replaced.
        as_mmengine: Whether the functions of a pure-Python configuration are values.

    Raises:
        ConfigParsingError: if the text is not valid Python or fails to execute; the error includes the line.
    """
    placeholders = Placeholders(text, ".py", name, environment=environment, kept=kept)
    if not (placeholders or lazy or _READS_BASE.search(text) or HAS_IMPORT.search(text)):
        # Most files need no syntax tree. Building it would take longer than all other steps together.
        code = _compile(text, name)
        namespace = _run(code, name, {})
        load_bases(namespace.get("_base_", []))
        return PythonFile(_values(namespace), uses=uses_of(code))
    tree = _parse(placeholders.text, name)
    if lazy or (lazy is None and is_lazy(tree, name)):
        return _read_lazy(tree, name, load_bases, placeholders, functions=as_mmengine)
    return _read_eager(tree, name, load_bases, placeholders)


def _read_eager(tree: ast.Module, name: str, load_bases: LoadBases, placeholders: Placeholders) -> PythonFile:
    not_keys = imported_names(tree)
    reader = _Reader(placeholders)
    reader.visit(tree)
    base: BaseValues = dict
    if reader.reads_base:
        base = load_bases(placeholders.fill_data(_literal_bases(tree, name), dict))
    given = reader.values(base)
    reader.fill_f_strings(base)
    code = _compile(tree, name)
    namespace = _run(code, name, dict(given))
    if reader.reads_base and reader.update_base_values(given, base):
        namespace = _run(code, name, dict(given))
    edits = NO_EDITS
    if reader.reads_base:
        edits = edits_of(as_plain(given[_BASE_VALUES]), base())
    else:
        load_bases(namespace.get("_base_", []))
    data = as_plain(_values(namespace, but=not_keys | given.keys()))
    uses = uses_of(code, base=reader.base_names, whole_base=reader.uses_whole_base)
    return PythonFile(data, placeholders.environment, base_edits=edits, uses=uses)


def _read_lazy(
    tree: ast.Module, name: str, load_bases: LoadBases, placeholders: Placeholders, *, functions: bool
) -> PythonFile:
    base = load_bases(extract_base_imports(tree, name))
    imports = extract_imports(tree, name)
    not_keys = imported_names(tree) | imports.keys()
    reader = _Reader(placeholders)
    reader.visit(tree)
    given = imports | reader.values(base)
    reader.fill_f_strings(base)
    inherited = ConfigDict(base())
    code = _compile(tree, name)
    namespace = _run(code, name, {**given, **dict(inherited.raw_items())})
    deleted = BaseEdits(removed=frozenset(inherited.keys() - namespace.keys()))
    data = as_plain(_values(namespace, but=not_keys | given.keys(), functions=functions))
    modules = frozenset(lazy_name(lazy).partition(".")[0] for lazy in imports.values())
    uses = uses_of(code, inherits=True, base=reader.base_names)
    return PythonFile(difference(data, base()), placeholders.environment, modules, deleted, uses)


def _parse(text: str, name: str) -> ast.Module:
    return _guarded(lambda: ast.parse(text, name), name)


def _compile(code: str | ast.Module, name: str) -> CodeType:
    return _guarded(lambda: compile(code, name, "exec", dont_inherit=True), name)


def _guarded(parse: Callable[[], T], name: str) -> T:
    try:
        return parse()
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigParsingError(f"{name}{line} is not valid Python: {error}.") from error


def _run(code: CodeType, name: str, given: dict[str, Any]) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__file__": name, "__name__": "stratagem_config", **given}
    try:
        exec(code, namespace)  # noqa: S102 -- a .py configuration is a program, and documented as one
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        where = f"{name}:{lines[-1]}" if lines else name
        if isinstance(error, StratagemError):
            raise type(error)(f"{where}: {error}") from error
        raise ConfigParsingError(f"{where} failed with {type(error).__name__}: {error}") from error
    return namespace


def _values(
    namespace: dict[str, Any], but: frozenset[str] | set[str] = frozenset(), *, functions: bool = False
) -> dict[str, Any]:
    skipped = (BuiltinFunctionType, ModuleType, type, *(() if functions else (FunctionType,)))
    return {
        key: value
        for key, value in namespace.items()
        if not (key in but or key == _BASE or key.startswith("__") or isinstance(value, skipped))
    }


def _literal_bases(tree: ast.Module, name: str) -> Any:
    """Return the literal value of ``_base_``, which is needed before the file is executed."""
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="_base_")], value=value):
                try:
                    return ast.literal_eval(value)
                except ValueError as error:
                    raise ConfigParsingError(
                        f"{name}:{statement.lineno}: _base_ must be a literal string or list, since this file reads values of "
                        "its base."
                    ) from error
    raise ConfigParsingError(f"{name} reads values of its base but does not define _base_.")


def _is_base(node: ast.expr) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and node.id == _BASE and not isinstance(node.ctx, ast.Store)


@final
class _Reader(ast.NodeTransformer):
    """Replaces placeholders and ``_base_`` in a syntax tree with names; :meth:`values` returns the values of the names."""

    def __init__(self, placeholders: Placeholders) -> None:
        self.reads_base = False
        self.uses_whole_base = False
        # The top-level keys of the base that the file reads.
        self.base_names: set[str] = set()
        self._placeholders = placeholders
        self._identifiers: dict[str, bool] = {}
        # Name -> a string that contains identifiers and other characters.
        self._named: dict[str, str] = {}
        # Strings inside f-strings, where a name cannot be inserted.
        self._texts: list[ast.Constant] = []

    def values(self, base: BaseValues) -> dict[str, Any]:
        """Return the values of the inserted names. The value of ``_base_`` is a copy, which the program may edit."""
        values = self._placeholder_values(base)
        return {**values, _BASE_VALUES: ConfigDict(base())} if self.reads_base else values

    def update_base_values(self, given: dict[str, Any], base: BaseValues) -> bool:
        """Update ``given`` with the values of placeholders after the program edited ``_base_``; return whether any changed.

        A placeholder always has the final value of the base, wherever it is in the file. If a value changed, ``_base_`` is
        reset to its state before the edits, so that the program can be executed again.
        """
        edited = as_plain(given[_BASE_VALUES])
        values = self._placeholder_values(lambda: edited)
        if all(is_same(value, given[identifier]) for identifier, value in values.items()):
            return False
        given.update({**values, _BASE_VALUES: ConfigDict(base())})
        return True

    def _placeholder_values(self, base: BaseValues) -> dict[str, Any]:
        values = {
            identifier: self._placeholders.value(identifier, base, bare=bare)
            for identifier, bare in self._identifiers.items()
        }
        return values | {name: self._placeholders.fill(text, base) for name, text in self._named.items()}

    def fill_f_strings(self, base: BaseValues) -> None:
        """Replace the identifiers inside f-strings with their values.

        Raises:
            ConfigValueError: if a value is a masked secret.
        """
        for constant in self._texts:
            constant.value = str(resolve(self._placeholders.fill(str(constant.value), base)))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if self._placeholders.is_identifier(node.id):
            self._record_base_use(node.id)
            self._identifiers[node.id] = True
        elif _is_base(node):
            self.uses_whole_base = True
            self._read_base(node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if not _is_base(node.value) or node.attr in _METHODS_OF_BASE:
            self.generic_visit(node)
            return node
        self.base_names.add(node.attr)
        self._read_base(node.value)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        match node:
            case ast.Subscript(value=ast.Name() as base, slice=ast.Constant(value=str(key))) if _is_base(base):
                self.base_names.add(key)
                self._read_base(base)
            case _:
                self.generic_visit(node)
        return node

    def _read_base(self, node: ast.Name) -> None:
        self.reads_base = True
        node.id = _BASE_VALUES

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, str) or not self._placeholders.has_identifier(node.value):
            return node
        self._record_base_use(node.value)
        if self._placeholders.is_identifier(node.value):
            self._identifiers.setdefault(node.value, False)
            return ast.copy_location(ast.Name(node.value, ast.Load()), node)
        name = f"_filled_text_{len(self._named)}_"
        self._named[name] = node.value
        return ast.copy_location(ast.Name(name, ast.Load()), node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        for part in node.values:
            if isinstance(part, ast.Constant):
                self._record_base_use(str(part.value))
                self._texts.append(part)
            else:
                self.visit(part)
        return node

    def _record_base_use(self, text: str) -> None:
        # Check the strings of the syntax tree instead of the file's text, in which a comment may contain a placeholder.
        names = self._placeholders.base_names(text)
        self.base_names |= names
        self.reads_base = self.reads_base or bool(names)
