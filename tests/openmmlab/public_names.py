"""Compare the public names of MMEngine, and the parameters of its functions and methods, with those of the layer.

What the code of the OpenMMLab packages imports from MMEngine, also from its inner modules, is compared as well.

    python tests/openmmlab/public_names.py

Each engine is inspected in a process of its own. The exit code is 1 if a name is missing or too many are unsupported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import tomllib
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

MODULES = tuple(
    "mmengine" + suffix
    for suffix in (
        "",
        ".config",
        ".registry",
        ".dist",
        ".logging",
        ".optim",
        ".optim.optimizer",
        ".optim.scheduler",
        ".model",
        ".model.wrappers",
        ".model.base_model",
        ".runner",
        "._strategy",
        ".hooks",
        ".evaluator",
        ".dataset",
        ".device",
        ".fileio",
        ".structures",
        ".utils",
        ".utils.dl_utils",
        ".visualization",
        ".analysis",
        ".infer",
        ".hub",
        ".testing",
    )
)
PACKAGES = ("mmcv", "mmpretrain", "mmdet", "mmseg")
MAX_UNSUPPORTED = 30
DIFFERENCES = Path(__file__).with_name("signature_differences.toml")
Description = dict[str, Any]


def describe() -> dict[str, Description]:
    """Return what each public name of the ``mmengine`` that this process imports is, by ``module:name``."""
    found: dict[str, Description] = {}
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            print(f"{module_name}: {error}", file=sys.stderr)
            continue
        for name in getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]:
            value = getattr(module, name, None)
            if isinstance(value, types.ModuleType) or getattr(value, "__module__", "mmengine") == "typing":
                continue
            found[f"{module_name}:{name}"] = _describe(value)
    return found


def _describe(value: Any) -> Description:
    if not inspect.isclass(value):
        return dict(parameters=_parameters(value) if callable(value) else None)
    unsupported = (value.__doc__ or "").startswith("Not supported: use")
    return dict(parameters=_parameters(value), methods=dict(_methods(value)), names=dir(value), unsupported=unsupported)


def _parameters(value: Any) -> list[str] | None:
    try:
        return [_stars(each) + each.name for each in inspect.signature(value).parameters.values()]
    except (TypeError, ValueError):
        return None


def _stars(parameter: inspect.Parameter) -> str:
    return {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")


def _methods(cls: type) -> Iterator[tuple[str, list[str] | None]]:
    for name in dir(cls):
        # Only what MMEngine defines, not what it inherits from torch or the standard library.
        owner = next(base for base in cls.__mro__ if name in vars(base)) if not name.startswith("_") else object
        if owner.__module__.startswith(("mmengine", "stratagem")):
            value = inspect.getattr_static(cls, name)
            yield name, _parameters(getattr(cls, name)) if not isinstance(value, property) else None


def imported_by_packages() -> set[str]:
    """Return what the installed packages import from MMEngine, as ``module:name``."""
    names = set()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} is not installed"
        assert spec.origin is not None, f"{package} is not installed"
        for file in Path(spec.origin).parent.rglob("*.py"):
            if ".mim" not in file.parts:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Some files have invalid escape sequences.
                    names |= set(_imports(ast.parse(file.read_text())))
    return names


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmengine" and not node.level:
            yield from (f"{node.module}:{alias.name}" for alias in node.names if alias.name != "*")


def importable(names: list[str]) -> list[str]:
    """Return those of the names that this process can import."""
    return [name for name in names if _can_import(*name.split(":"))]


def _can_import(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}") is not None
    except ImportError:
        return False


@dataclass(frozen=True)
class Comparison:
    """The names of MMEngine, by what the layer has."""

    names: int
    missing: tuple[str, ...]
    unsupported: tuple[str, ...]
    missing_methods: tuple[str, ...]
    other_parameters: dict[str, str]
    missing_imports: tuple[str, ...]
    """What the packages import from MMEngine and the layer does not have."""


def compare(mmengine: dict[str, Description], layer: dict[str, Description]) -> Comparison:
    """Sort the names of MMEngine by what the layer has."""
    missing_methods, other_parameters = [], {}
    unsupported = [name for name in mmengine if layer.get(name, {}).get("unsupported")]
    for name in sorted(set(mmengine) & set(layer) - set(unsupported)):
        theirs, ours = mmengine[name], layer[name]
        pairs = {name: (theirs["parameters"], ours["parameters"])}
        for method, parameters in (theirs.get("methods") or {}).items():
            if method in (ours.get("methods") or {}):
                pairs[f"{name}.{method}"] = (parameters, ours["methods"][method])
            elif method not in (ours.get("names") or []):
                missing_methods.append(f"{name}.{method}")
        for key, (expected, actual) in pairs.items():
            if expected is not None and not _accepts(expected, actual):
                other_parameters[key] = f"MMEngine: {expected}, here: {actual}"
    return Comparison(
        len(mmengine),
        tuple(sorted(set(mmengine) - set(layer))),
        tuple(unsupported),
        tuple(missing_methods),
        other_parameters,
        (),
    )


def _accepts(expected: list[str], actual: list[str] | None) -> bool:
    """Return whether calls with MMEngine's parameters are accepted: by position and by keyword."""
    if actual is None:
        return False
    takes_any = any(name.startswith("**") for name in actual)
    first_star = next((index for index, name in enumerate(expected) if name.startswith("*")), len(expected))
    by_position = enumerate(expected[:first_star])
    by_keyword = [name for name in expected[first_star:] if not name.startswith("*")]
    return all(
        actual[index : index + 1] == [name] or (takes_any and name not in actual[:index]) for index, name in by_position
    ) and all(name in actual or takes_any for name in by_keyword)


def read_differences() -> dict[str, str]:
    """Return the reason of each difference on purpose, by a pattern of ``module:name`` or ``module:name.method``."""
    return tomllib.loads(DIFFERENCES.read_text()) if DIFFERENCES.exists() else {}


def unexplained(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the names that no pattern matches."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in known)]


def compare_engines() -> Comparison:
    """Inspect both engines, each in a process of its own."""
    imported = sorted(imported_by_packages())
    answers = [_ask(first, imported) for first in ("", "import stratagem.compat.mmengine; ")]
    comparison = compare(answers[0]["names"], answers[1]["names"])
    return replace(comparison, missing_imports=tuple(sorted({*answers[0]["imports"]} - {*answers[1]["imports"]})))


def _ask(first: str, imported: list[str]) -> dict[str, Any]:
    program = (
        f"{first}import json, runpy, sys; own = runpy.run_path({__file__!r}); "
        "print(json.dumps(dict(names=own['describe'](), imports=own['importable'](json.loads(sys.stdin.read())))))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, input=json.dumps(imported), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> int:
    """Print the differences."""
    comparison, known = compare_engines(), read_differences()
    methods = unexplained(comparison.missing_methods, known)
    others = {name: comparison.other_parameters[name] for name in unexplained(comparison.other_parameters, known)}
    found = {
        f"of {comparison.names} public names are missing": comparison.missing,
        f"of {comparison.names} public names are unsupported": comparison.unsupported,
        f"names that {', '.join(PACKAGES)} import are missing": comparison.missing_imports,
        "methods are missing": methods,
        "have other parameters": [f"{name}: {text}" for name, text in others.items()],
    }
    for title, names in found.items():
        print(f"{len(names)} {title}", *names, sep="\n  ")
    bad = comparison.missing or comparison.missing_imports or methods or others
    return int(bool(bad) or len(comparison.unsupported) > MAX_UNSUPPORTED)


if __name__ == "__main__":
    sys.exit(main())
