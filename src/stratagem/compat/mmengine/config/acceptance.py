"""Refuse misspelled top-level keys of MMEngine's configurations, and warn about keys without effect."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from stratagem.compat.mmengine.config.config import Config
from stratagem.compat.mmengine.config.keys import KEYS
from stratagem.config.mmcv_keys import MMCV_KEYS
from stratagem.config.variables import Severity, examine_name, is_foreign_scope
from stratagem.errors import ConfigKeyError

__all__ = ["require_accepted"]

_ADVICE = "Remove it, or read it in a file if it is a variable."


def require_accepted(cfg: Mapping[str, Any] | Config) -> None:
    """Check that each top-level key of a configuration is one that MMEngine reads or a variable of its files.

    A key of MMCV 1, a variable that is changed after it was used, and, if ``default_scope`` is that of another project, a key
    that nothing uses and that is not similar to any known key, cause a warning. Keys that the program has set after loading the
    files are not reported, unless they look like typos. Not collective.

    Raises:
        ConfigKeyError: for a key that is similar to a known key, and for one that nothing uses; lists all of them.
    """
    layers = cfg.file_layers if isinstance(cfg, Config) else ()
    foreign = is_foreign_scope(cfg.get("default_scope"))
    refused = []
    for name in cfg:
        if name in KEYS:
            continue
        found = examine_name(name, layers, KEYS, foreign=foreign, set_by_program=True, advice=_ADVICE)
        if found is None:
            continue
        where = cfg.where(name) if isinstance(cfg, Config) else ""
        if name in MMCV_KEYS:
            warnings.warn(
                f"{where}{name} is a key of MMCV 1, which has no effect. Write {MMCV_KEYS[name]}.", stacklevel=2
            )
        elif found.severity is Severity.WARNING:
            warnings.warn(f"{where}{found.message}", stacklevel=2)
        else:
            refused.append(f"{where}{found.message}")
    if len(refused) == 1:
        raise ConfigKeyError(refused[0])
    if refused:
        title = f"{getattr(cfg, 'filename', None) or 'The configuration'} has {len(refused)} unknown keys:"
        raise ConfigKeyError("\n  ".join([title, *refused]))
