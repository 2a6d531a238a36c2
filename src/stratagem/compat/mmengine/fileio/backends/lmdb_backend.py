"""Values in LMDB databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stratagem.compat.mmengine.checks import NotSupportedError, missing_package
from stratagem.compat.mmengine.fileio.backends.base import BaseStorageBackend
from stratagem.utils import import_module

__all__ = ["LmdbBackend"]


class LmdbBackend(BaseStorageBackend):
    """Read values from an LMDB database, which is opened at the first access.

    Args:
        db_path: the database.
        readonly: whether it is opened for reading only.
        lock: whether concurrent processes are kept out by a lock.
        readahead: whether the system reads ahead, which slows down access in random order.
        kwargs: further arguments of ``lmdb.open``.

    Raises:
        ImportError: if lmdb is not installed.
    """

    def __init__(
        self,
        db_path: str | Path,
        readonly: bool = True,
        lock: bool = False,
        readahead: bool = False,
        **kwargs: Any,
    ) -> None:
        self._client: Any = None
        try:
            self._lmdb: Any = import_module("lmdb")
        except ImportError as error:
            raise missing_package("lmdb", "LmdbBackend") from error
        self.db_path = str(db_path)
        self._options = {"readonly": readonly, "lock": lock, "readahead": readahead, **kwargs}

    def get(self, filepath: str | Path) -> Any:
        """Return the value of a key as bytes, or None if the database does not have it."""
        if self._client is None:
            self._client = self._lmdb.open(self.db_path, **self._options)
        with self._client.begin(write=False) as transaction:
            return transaction.get(str(filepath).encode("ascii"))

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        raise NotSupportedError(f"LmdbBackend does not read text ({filepath}, {encoding}). Use get().decode().")

    def __del__(self) -> None:
        if self._client is not None:
            self._client.close()
