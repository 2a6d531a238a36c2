"""YAML."""

from __future__ import annotations

from typing import IO, Any

import yaml

from stratagem.compat.mmengine.fileio.handlers.base import BaseFileHandler

__all__ = ["YamlHandler"]

# The C implementations are faster. Not the unsafe loader, which calls whatever the file names.
_LOADER = getattr(yaml, "CFullLoader", yaml.FullLoader)
_DUMPER = getattr(yaml, "CDumper", yaml.Dumper)


class YamlHandler(BaseFileHandler):
    """Read and write YAML. Reading does not create objects of classes that the file names, unless ``Loader`` allows it."""

    def load_from_fileobj(self, file: IO[Any], **kwargs: Any) -> Any:
        return yaml.load(file, **{"Loader": _LOADER, **kwargs})  # noqa: S506 -- a loader without objects

    def dump_to_fileobj(self, obj: Any, file: IO[Any], **kwargs: Any) -> None:
        yaml.dump(obj, file, **{"Dumper": _DUMPER, **kwargs})

    def dump_to_str(self, obj: Any, **kwargs: Any) -> str:
        text: str = yaml.dump(obj, **{"Dumper": _DUMPER, **kwargs})
        return text
