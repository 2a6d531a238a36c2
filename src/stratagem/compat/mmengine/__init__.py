"""The interface of MMEngine 0.10, implemented with Stratagem.

Importing this package makes ``mmengine`` refer to it, in this process and in the processes that :mod:`multiprocessing` starts.
Import it before anything that imports ``mmengine``::

    import stratagem.compat.mmengine  # isort: skip
    from mmengine.runner import Runner

``stratagem run-mmengine SCRIPT ...`` does the same for a script that is not changed. The modules of this package have the names
of MMEngine's modules, so each ``mmengine.<module>`` is ``stratagem.compat.mmengine.<module>``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from stratagem.compat.mmengine import alias
from stratagem.compat.mmengine.version import __version__ as __version__
from stratagem.compat.mmengine.version import parse_version_info as parse_version_info
from stratagem.compat.mmengine.version import version_info as version_info

# The subpackages whose public names are also names of the package. They are imported when such a name is first used.
_EXPORTED = ("registry", "utils", "logging", "config", "fileio")

alias.install()


def __getattr__(name: str) -> Any:
    if not name.startswith("__"):
        for subpackage in _EXPORTED:
            module = _subpackage(subpackage)
            if module is not None and name in module.__all__:
                found = globals()[name] = getattr(module, name)
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = [module for module in map(_subpackage, _EXPORTED) if module is not None]
    return sorted({*globals(), *(name for module in modules for name in module.__all__)})


def _subpackage(name: str) -> Any:
    full = f"{__name__}.{name}"
    return importlib.import_module(full) if importlib.util.find_spec(full) is not None else None
