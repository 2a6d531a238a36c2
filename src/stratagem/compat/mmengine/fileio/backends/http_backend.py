"""Files on web servers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from stratagem.compat.mmengine.fileio.backends.base import BaseStorageBackend
from stratagem.errors import ConfigValueError

__all__ = ["HTTPBackend", "temporary_copy"]


class HTTPBackend(BaseStorageBackend):
    """Read files from web servers."""

    def get(self, filepath: str | Path) -> bytes:
        address = str(filepath)
        if not address.startswith(("http://", "https://")):
            raise ConfigValueError(f"{address!r} is not the address of a file on a web server, such as https://...")
        with urlopen(address) as answer:  # noqa: S310 -- the scheme has been checked
            content: bytes = answer.read()
        return content

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> str:
        return self.get(filepath).decode(encoding)

    @contextmanager
    def get_local_path(self, filepath: str | Path) -> Iterator[str]:
        """Yield the path of a temporary copy, which is removed at the end of the block."""
        with temporary_copy(self.get(filepath)) as path:
            yield path


@contextmanager
def temporary_copy(content: bytes) -> Iterator[str]:
    """Yield the path of a temporary file with this content, which is removed at the end of the block."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(content)
    try:
        yield file.name
    finally:
        Path(file.name).unlink(missing_ok=True)
