"""Pure-Python configurations, whose imports are not executed: imported names become lazy objects."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.errors import ConfigParsingError
from stratagem.utils.lazy import LazyObject

__all__ = [
    "BaseImport",
    "LazyImports",
    "extract_base_imports",
    "extract_imports",
    "imported_names",
    "is_lazy",
    "locate_base",
    "read_base",
]

# A file without import statements need not be parsed into a syntax tree.
HAS_IMPORT = re.compile(r"^\s*(?:import|from)\s", re.MULTILINE)

LazyImports = dict[str, LazyObject]


@contextmanager
def read_base() -> Iterator[None]:
    """Mark the imports in the block as bases of this configuration.

    For ``from .base import *`` in the block, ``Config.fromfile`` reads the file ``base.py``. When the file is imported as a
    module, the block has no effect and the imports are executed, so that editors and type checkers understand the file.
    """
    yield


def imported_names(tree: ast.Module) -> set[str]:
    """Return the names defined by the top-level imports of a file; they are not keys of the configuration."""
    imports = [item for item in tree.body if isinstance(item, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name.partition(".")[0] for item in imports for alias in item.names}


@final
@dataclass(frozen=True, slots=True)
class BaseImport:
    """A ``from .module import names`` in a ``read_base`` block. ``names`` maps each name to its alias; None means ``*``."""

    module: str
    level: int
    names: dict[str, str] | None
    line: int


def is_lazy(tree: ast.Module, name: str) -> bool:
    """Return whether a file is a pure-Python configuration: it uses ``read_base`` or imports third-party modules.

    The imports of a file with ``_base_`` are executed, so such a file is not a pure-Python configuration.

    Raises:
        ConfigParsingError: if it has both ``_base_`` and ``read_base``.
    """
    reads_base = any(_is_read_base(statement) for statement in tree.body)
    has_base = any(
        isinstance(statement, ast.Assign)
        and any(isinstance(to, ast.Name) and to.id == "_base_" for to in statement.targets)
        for statement in tree.body
    )
    if has_base and reads_base:
        raise ConfigParsingError(f"{name} has both _base_ and read_base(). Use one of them.")
    return not has_base and (reads_base or any(_is_third_party(statement) for statement in tree.body))


def extract_base_imports(tree: ast.Module, name: str) -> list[BaseImport]:
    """Remove the ``with read_base():`` blocks from the tree and return their imports.

    Raises:
        ConfigParsingError: if a block contains statements other than ``from module import names``.
    """
    imports = []
    kept: list[ast.stmt] = []
    for statement in tree.body:
        if not (isinstance(statement, ast.With) and _is_read_base(statement)):
            kept.append(statement)
            continue
        for line in statement.body:
            if not isinstance(line, ast.ImportFrom):
                raise ConfigParsingError(
                    f"{name}:{line.lineno}: a read_base() block can contain only imports such as `from .base import *`."
                )
            everything = line.names[0].name == "*"
            names = None if everything else {item.name: item.asname or item.name for item in line.names}
            imports.append(BaseImport(line.module or "", line.level, names, line.lineno))
    tree.body = kept
    return imports


def extract_imports(tree: ast.Module, name: str) -> LazyImports:
    """Remove the imports of third-party modules from the tree, and return a lazy object for each imported name.

    Raises:
        ConfigParsingError: for a relative import outside ``read_base``, and for ``import *``.
    """
    extractor = _ImportExtractor(name)
    extractor.visit(tree)
    ast.fix_missing_locations(tree)
    return extractor.imports


def locate_base(wanted: BaseImport, name: str, find_package: Callable[[str], Path]) -> Path:
    """Return the file that a base import refers to.

    Raises:
        ConfigParsingError: if the import does not name a module.
    """
    if not wanted.module:
        raise ConfigParsingError(f"{name}:{wanted.line}: name the base file, as in `from .base import *`.")
    parts = wanted.module.split(".")
    if wanted.level:
        folder = Path(name).parent
        for _ in range(wanted.level - 1):
            folder = folder / ".."
    else:
        folder = find_package(parts.pop(0))
    return folder.joinpath(*parts).with_suffix(".py")


@final
class _ImportExtractor(ast.NodeTransformer):
    """Removes imports and collects the imported names. Imports inside functions are kept, since they are executed later."""

    def __init__(self, name: str) -> None:
        self.imports: LazyImports = {}
        self._name = name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_Import(self, node: ast.Import) -> ast.stmt | None:
        known = [item for item in node.names if _is_stdlib(item.name)]
        for item in node.names:
            if item not in known:
                top = item.name.partition(".")[0]
                self.imports[item.asname or top] = LazyObject(item.name if item.asname else top, "", self._at(node))
        return ast.Import(known) if known else ast.Pass()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        if not _is_third_party(node):
            return node
        if node.level:
            raise ConfigParsingError(
                f"{self._at(node)}: a relative import is only allowed in a `with read_base():` block."
            )
        for item in node.names:
            if item.name == "*":
                raise ConfigParsingError(f"{self._at(node)}: list the names to import from {node.module} instead of *.")
            self.imports[item.asname or item.name] = LazyObject(node.module or "", item.name, self._at(node))
        return ast.Pass()

    def _at(self, node: ast.stmt) -> str:
        return f"{self._name}:{node.lineno}"


def _is_read_base(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.With) or len(statement.items) != 1:
        return False
    match statement.items[0].context_expr:
        case ast.Call(func=ast.Name(id="read_base") | ast.Attribute(attr="read_base")):
            return True
    return False


def _is_third_party(statement: ast.stmt) -> bool:
    match statement:
        case ast.Import(names=names):
            return not all(_is_stdlib(item.name) for item in names)
        case ast.ImportFrom(level=level, module=module):
            return level > 0 or not _is_stdlib(module or "")
    return False


def _is_stdlib(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names
