"""Pure helpers: names, imports, versions, paths, seeds and the report of the environment."""

from stratagem.utils.imports import import_module, import_object
from stratagem.utils.names import did_you_mean, nearest_names
from stratagem.utils.paths import absolute, is_url
from stratagem.utils.versions import digit_version

__all__ = ["absolute", "did_you_mean", "digit_version", "import_module", "import_object", "is_url", "nearest_names"]
