"""Check the layers of the architecture: which modules may import which, from the syntax trees of all modules."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pytest

import stratagem.registry
from stratagem.registry import Registry

SOURCE = Path(__file__).parents[1] / "src" / "stratagem"

# A module imports only from earlier rows and from its own folder.
LAYERS = (
    {"_version", "errors", "builtin_entries"},
    {"utils"},
    {"logging"},
    {"config", "registry"},
    {"distributed", "storage", "hardware"},
    {"tensors", "step"},
    {"trace"},
    {"optim", "data"},
    {"model"},
    {"parallel"},
    {"checkpoint"},
    {"strategies"},
    {"engines"},
    {"train"},
    {"report"},
    {"config_schema"},
    {"runner"},
    {"planning"},
    {"compat"},
    {"cli"},
    {"__main__"},
    {"dist"},
)
ROOM_LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules(source: Path) -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@final
@dataclass(frozen=True)
class Syntax:
    """What the checks use of the syntax tree of a file.

    Attributes:
        imports: each import, with whether it is inside a function.
        type_checking: the lines that use ``TYPE_CHECKING``.
        texts: each string, and each f-string, that is not part of another.
        constants: the name and value of each top-level assignment of a string.
    """

    imports: tuple[tuple[ast.Import | ast.ImportFrom, bool], ...]
    type_checking: tuple[int, ...]
    texts: tuple[ast.JoinedStr | ast.Constant, ...]
    constants: Mapping[str, str]


@functools.cache
def syntax(path: Path) -> Syntax:
    """Parse a file; once for all checks, because it takes most of their time."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    imports, type_checking, texts = [], [], []
    pending: deque[tuple[ast.AST, bool]] = deque([(tree, False)])
    while pending:
        node, inside = pending.popleft()
        match node:
            case ast.Import() | ast.ImportFrom():
                imports.append((node, inside))
            case ast.Name(id="TYPE_CHECKING"):
                type_checking.append(node.lineno)
            case ast.Constant(value=str()):
                texts.append(node)
            case ast.JoinedStr():
                texts.append(node)
                # Its own strings are not texts, but those in its expressions are.
                pending += [(part, inside) for part in node.values if not isinstance(part, ast.Constant)]
                continue
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]
    return Syntax(tuple(imports), tuple(type_checking), tuple(texts), dict(string_constants(tree)))


def own_imports(name: str, path: Path, known: set[str]) -> Iterator[tuple[str, ast.stmt, bool]]:
    """Yield each module of this package that a module imports, with the statement and whether it is inside a function."""
    for node, inside in syntax(path).imports:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node, inside) for alias in node.names if alias.name.split(".")[0] == "stratagem")
            continue
        base = node.module or ""
        if node.level:
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        if base.split(".")[0] != "stratagem":
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield (inner if inner in known else base), node, inside


def room(name: str) -> str:
    """Return the folder or top-level file that contains a module; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def layer_violations(source: Path) -> list[str]:
    """Return one line for each import that violates the order of the layers."""
    found = modules(source)
    lines = []
    for name, path in found.items():
        for target, node, _ in own_imports(name, path, set(found)):
            here, there = room(name), room(target)
            if here in {there, ""}:
                continue
            if there not in ROOM_LEVEL or here not in ROOM_LEVEL or ROOM_LEVEL[there] >= ROOM_LEVEL[here]:
                lines.append(f"{path}:{node.lineno}: {here or 'the package'} must not import {target}")
    return lines


def hidden_imports(source: Path) -> list[str]:
    """Return one line for each import of this package inside a function or under TYPE_CHECKING."""
    found = modules(source)
    lines = []
    for name, path in found.items():
        lines += [
            f"{path}:{node.lineno}: {target} is imported inside a function"
            for target, node, inside in own_imports(name, path, set(found))
            if inside
        ]
        lines += [f"{path}:{line}: TYPE_CHECKING hides an import" for line in syntax(path).type_checking]
    return lines


def cycles(source: Path) -> list[str]:
    """Return one line for each cycle of top-level imports."""
    found = modules(source)
    arrows = {name: {t for t, _, _ in own_imports(name, path, set(found))} & set(found) for name, path in found.items()}
    # A package's __init__ only re-exports names, so its imports from its own modules are not cycles.
    for name, path in found.items():
        if path.name == "__init__.py":
            arrows[name] = {target for target in arrows[name] if not target.startswith(f"{name}.")}
    circles: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
            return
        if name in done:
            return
        for target in sorted(arrows[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in found:
        visit(name, ())
    return circles


# A string that names a module of this package, or something in one: "stratagem.x.y", "stratagem.x:Y".
DOTTED = re.compile(r"(?<![\w./-])stratagem(?:\.\w+)+(?::\w+)?")
# A string that is the target of an import: "package.module:name", or "module:name" for a module next to the file.
TARGET = re.compile(r"[a-z_][\w.]*:[A-Za-z_][\w.]*")


def named_targets(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield every import target that is written as a string in a module, with its line.

    An f-string counts if its values are string constants of the module, such as ``f"{_HERE}.state:DeepSpeedState"``.
    """
    here = syntax(path)
    for node in here.texts:
        text = joined(node, here.constants) if isinstance(node, ast.JoinedStr) else str(node.value)
        if text is not None and TARGET.fullmatch(text):
            sibling = f"{name.rpartition('.')[0]}.{text}"
            is_sibling = "." not in text.partition(":")[0] and (path.parent / f"{text.partition(':')[0]}.py").is_file()
            yield sibling if is_sibling else text, node.lineno
        elif text is not None:
            yield from ((match[0], node.lineno) for match in DOTTED.finditer(text))


def string_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each top-level assignment of a string."""
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text)))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(text)))
            ):
                yield name, text


def joined(node: ast.JoinedStr, constants: Mapping[str, str]) -> str | None:
    """Return the value of an f-string if it consists of constants, else None."""
    text = ""
    for part in node.values:
        inner = part.value if isinstance(part, ast.FormattedValue) else part
        if isinstance(inner, ast.Constant):
            text += str(inner.value)
        elif isinstance(inner, ast.Name) and inner.id in constants:
            text += constants[inner.id]
        else:
            return None
    return text


def resolve(target: str) -> Any:
    """Import what ``"package.module:name"`` or ``"package.module.name"`` names."""
    module, _, attributes = target.partition(":")
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        for part in [*parts[end:], *filter(None, attributes.split("."))]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"There is no module {parts[0]}.", name=parts[0])


def resolution_error(target: str) -> str | None:
    """Return why a target cannot be imported; None if it can, or if a package that it needs is not installed."""
    try:
        resolve(target)
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        package = (cause.name or "").partition(".")[0]
        if package and package != "stratagem" and importlib.util.find_spec(package) is None:
            return None
        return repr(error)
    except AttributeError as error:
        return repr(error)
    return None


def test_every_room_has_its_layer() -> None:
    """Every folder and top-level file is listed in the table of layers."""
    rooms = {room(name) for name in modules(SOURCE)} - {""}
    assert rooms <= set(ROOM_LEVEL)


@pytest.mark.slow
def test_no_import_goes_against_the_layers() -> None:
    """A module imports only from earlier layers and from its own folder."""
    assert layer_violations(SOURCE) == []


@pytest.mark.slow
def test_no_import_is_hidden_in_a_function() -> None:
    """Modules of this package are imported at the top of a file."""
    assert hidden_imports(SOURCE) == []


@pytest.mark.slow
def test_no_import_cycle() -> None:
    """There are no import cycles."""
    assert cycles(SOURCE) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_every_import_target_in_a_string_resolves() -> None:
    """Strings such as ``"stratagem.x:Y"``, which no type checker follows, name modules and names that exist."""
    targets: dict[str, str] = {}
    for name, path in modules(SOURCE).items():
        targets |= {target: f"{path}:{line}" for target, line in named_targets(name, path)}
    registries = {key: value for key, value in vars(stratagem.registry).items() if isinstance(value, Registry)}
    for key, registry in registries.items():
        targets |= dict.fromkeys(registry._builtin_entries.values(), f"registry {key}")
    assert len(targets) > 100
    errors = {target: resolution_error(target) for target in targets}
    assert [f"{targets[target]}: {target}: {error}" for target, error in errors.items() if error] == []


def test_an_import_target_that_does_not_exist_is_detected(tmp_path: Path) -> None:
    """Targets are found in constants, f-strings and next to the file, and a wrong module or name raises an error."""
    (tmp_path / "near.py").touch()
    path = tmp_path / "file.py"
    path.write_text(
        'HERE = "stratagem.utils"\n"stratagem.errors:Nothing"\nf"{HERE}.nowhere:x"\n"near:Thing"\n"see stratagem.errors"\n'
    )
    found = [target for target, _ in named_targets("stratagem.room.file", path)]
    assert sorted(found) == [
        "stratagem.errors",
        "stratagem.errors:Nothing",
        "stratagem.room.near:Thing",
        "stratagem.utils",
        "stratagem.utils.nowhere:x",
    ]
    assert [target for target in found if resolution_error(target) is None] == ["stratagem.utils", "stratagem.errors"]
    assert resolution_error("not_installed.module:name") is None


@pytest.mark.parametrize(
    ("file", "text", "check"),
    [
        ("distributed/bad.py", "from stratagem.train import loops\n", layer_violations),
        ("distributed/bad.py", "import stratagem.runner\n", layer_violations),
        ("utils/bad.py", "def f():\n    from stratagem import errors\n", hidden_imports),
        ("utils/bad.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\n", hidden_imports),
        ("utils/one.py", "from stratagem.utils import two\n", cycles),
        ("utils/one.py", "from .two import x\n", cycles),
    ],
)
def test_the_checks_detect_a_violation(tmp_path: Path, file: str, text: str, check) -> None:  # type: ignore[no-untyped-def]
    """Each check reports a file that violates its rule, including relative imports."""
    package = tmp_path / "stratagem"
    for folder in ("distributed", "utils", "train"):
        (package / folder).mkdir(parents=True)
        (package / folder / "__init__.py").touch()
    for name in ("__init__", "errors", "runner", "train/loops"):
        (package / f"{name}.py").touch()
    (package / "utils" / "two.py").write_text("from stratagem.utils import one\n")
    (package / "utils" / "one.py").touch()
    (package / file).write_text(text)
    assert len(check(package)) == 1
