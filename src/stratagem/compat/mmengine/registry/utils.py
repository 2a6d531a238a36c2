"""Statistics of registries, and the default scope of a program."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from stratagem.compat.mmengine.logging.logger import print_log
from stratagem.compat.mmengine.registry import root
from stratagem.compat.mmengine.registry.default_scope import DefaultScope
from stratagem.compat.mmengine.registry.registry import Registry

__all__ = ["count_registered_modules", "init_default_scope", "traverse_registry_tree"]


def traverse_registry_tree(registry: Registry, verbose: bool = True) -> list[dict[str, Any]]:
    """Return, for each registry of the tree that contains ``registry``, its number of entries, scope, and names by package.

    Args:
        registry: any registry of the tree.
        verbose: whether to log the numbers.
    """
    found: list[dict[str, Any]] = []
    waiting = [registry.root]
    while waiting:
        current = waiting.pop()
        info: dict[str, Any] = {"num_modules": len(current.module_dict), "scope": current.scope}
        for name, item in current.module_dict.items():
            info.setdefault(item.__module__.rpartition(".")[0].replace(".", "/"), []).append(name)
        if verbose:
            _log(f"The {current.name} registry of {current.scope} has {len(current.module_dict)} entries.")
        found.append(info)
        waiting.extend(reversed(current.children.values()))
    return found


def count_registered_modules(save_path: str | None = None, verbose: bool = True) -> dict[str, Any]:
    """Return the entries of all root registries and of their children, and the time.

    Args:
        save_path: a folder in which the result is written to ``modules_statistic_results.json``.
        verbose: whether to log the result.
    """
    registries = {name: getattr(root, name) for name in root.__all__}
    for registry in registries.values():
        registry.import_from_location()
    result = {
        "scan_date": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        "registries": {name: traverse_registry_tree(registry, verbose) for name, registry in registries.items()},
    }
    if verbose:
        _log(f"The registries contain: {result}")
    if save_path is not None:
        file = Path(save_path) / "modules_statistic_results.json"
        file.write_text(json.dumps(result, indent=2), encoding="utf-8")
        _log(f"The result has been saved to {file}.")
    return result


def init_default_scope(scope: str) -> None:
    """Make ``scope`` the default scope. If another one is current, a warning is logged."""
    current = DefaultScope.get_current_instance()
    if current is None or not DefaultScope.check_instance_created(scope):
        DefaultScope.get_instance(scope, scope_name=scope)
    elif current.scope_name != scope:
        _log(f"The default scope changes from {current.scope_name!r} to {scope!r}.", logging.WARNING)
        DefaultScope.get_instance(DefaultScope.unused_name(scope), scope_name=scope)


def _log(message: str, level: int = logging.INFO) -> None:
    print_log(message, logger="current", level=level)
