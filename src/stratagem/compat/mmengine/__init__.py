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
            module = importlib.import_module(f"{__name__}.{subpackage}")
            if name in module.__all__:
                found = globals()[name] = getattr(module, name)
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = [importlib.import_module(f"{__name__}.{subpackage}") for subpackage in _EXPORTED]
    return sorted({*globals(), *(name for module in modules for name in module.__all__)})
