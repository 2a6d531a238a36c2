"""Helpers that do not depend on the rest of the package: names, imports, versions, paths, seeds, secrets.

Helpers that need torch are imported on first use, so that reading a configuration does not import torch.
"""

from typing import Any

from stratagem.utils.imports import import_module, import_object
from stratagem.utils.names import did_you_mean, nearest_names, refuse_unknown
from stratagem.utils.paths import absolute, is_url
from stratagem.utils.versions import digit_version

_LAZY_NAMES = {
    "AppliedSettings": "stratagem.utils.multiprocess:AppliedSettings",
    "canonical_names": "stratagem.utils.module_names:canonical_names",
    "collect_env": "stratagem.utils.environment_report:collect_env",
    "generator_state": "stratagem.utils.seeding:generator_state",
    "mask_secrets": "stratagem.utils.secrets.masking:mask_secrets",
    "mask_text": "stratagem.utils.secrets.masking:mask_text",
    "named_buffers": "stratagem.utils.module_names:named_buffers",
    "named_parameters": "stratagem.utils.module_names:named_parameters",
    "restore_generator_state": "stratagem.utils.seeding:restore_generator_state",
    "set_multi_processing": "stratagem.utils.multiprocess:set_multi_processing",
    "set_random_seed": "stratagem.utils.seeding:set_random_seed",
    "unwrap_data_parallel": "stratagem.utils.module_names:unwrap_data_parallel",
    "with_canonical_keys": "stratagem.utils.module_names:with_canonical_keys",
}

__all__ = [
    "AppliedSettings",
    "absolute",
    "canonical_names",
    "collect_env",
    "did_you_mean",
    "digit_version",
    "generator_state",
    "import_module",
    "import_object",
    "is_url",
    "mask_secrets",
    "mask_text",
    "named_buffers",
    "named_parameters",
    "nearest_names",
    "refuse_unknown",
    "restore_generator_state",
    "set_multi_processing",
    "set_random_seed",
    "unwrap_data_parallel",
    "with_canonical_keys",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = import_object(_LAZY_NAMES[name])
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_NAMES})
