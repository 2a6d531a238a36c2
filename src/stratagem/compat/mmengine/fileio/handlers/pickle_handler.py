"""Pickles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

from stratagem.compat.mmengine.fileio.handlers.base import BaseFileHandler

__all__ = ["PickleHandler"]

_PROTOCOL = 2


class PickleHandler(BaseFileHandler):
    """Read and write pickles. Reading one can execute any code, so read only files that you trust."""

    str_like = False

    def load_from_fileobj(self, file: IO[Any], **kwargs: Any) -> Any:
        return pickle.load(file, **kwargs)  # noqa: S301 -- the purpose of this class

    def load_from_path(self, filepath: str | Path, mode: str = "rb", **kwargs: Any) -> Any:
        return super().load_from_path(filepath, mode=mode, **kwargs)

    def dump_to_str(self, obj: Any, **kwargs: Any) -> bytes:
        return pickle.dumps(obj, **{"protocol": _PROTOCOL, **kwargs})

    def dump_to_fileobj(self, obj: Any, file: IO[Any], **kwargs: Any) -> None:
        pickle.dump(obj, file, **{"protocol": _PROTOCOL, **kwargs})

    def dump_to_path(self, obj: Any, filepath: str | Path, mode: str = "wb", **kwargs: Any) -> None:
        super().dump_to_path(obj, filepath, mode=mode, **kwargs)
