"""Values on memcached servers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stratagem.compat.mmengine.checks import NotSupportedError, missing_package
from stratagem.compat.mmengine.fileio.backends.base import BaseStorageBackend
from stratagem.utils import import_module

__all__ = ["MemcachedBackend"]


class MemcachedBackend(BaseStorageBackend):
    """Read values from memcached servers with the library ``mc``.

    Args:
        server_list_cfg: the file that lists the servers.
        client_cfg: the file that configures the client.
        sys_path: a folder that contains the library.

    Raises:
        ImportError: if the library is not installed.
    """

    def __init__(self, server_list_cfg: str, client_cfg: str, sys_path: str | None = None) -> None:
        if sys_path is not None and sys_path not in sys.path:
            sys.path.append(sys_path)
        try:
            self._mc: Any = import_module("mc")
        except ImportError as error:
            raise missing_package("mc", "MemcachedBackend") from error
        self.server_list_cfg = server_list_cfg
        self.client_cfg = client_cfg
        self._client = self._mc.MemcachedClient.GetInstance(server_list_cfg, client_cfg)
        self._buffer = self._mc.pyvector()

    def get(self, filepath: str | Path) -> Any:
        self._client.Get(str(filepath), self._buffer)
        return self._mc.ConvertBuffer(self._buffer)

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        raise NotSupportedError(f"MemcachedBackend does not read text ({filepath}, {encoding}).")
