"""Checkpoints at places that fsspec opens, such as ``s3://bucket/run/epoch_3``.

A checkpoint is made on this machine as everywhere else, and then published there whole; reading one fetches it into the
cache first, where its digests are compared.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from stratagem.checkpoint.download import download_limit_bytes
from stratagem.errors import CheckpointError, CheckpointNotFoundError, StratagemError
from stratagem.storage import RemoteFolder, atomic_file, fetch_published, list_published, publish
from stratagem.utils import mask_text

__all__ = ["fetch_remote", "latest_remote", "save_remote"]

_CHUNK_BYTES = 4 << 20


def save_remote(url: str, write: Callable[[Path], None]) -> None:
    """Have ``write`` make a checkpoint under the URL's name in a temporary folder, and publish it at the URL.

    Not collective: one process writes.

    Raises:
        CheckpointError: if it cannot be published; what was published there before still is.
    """
    with tempfile.TemporaryDirectory(prefix="stratagem-") as folder:
        local = Path(folder, url.rstrip("/").rpartition("/")[2])
        write(local)
        try:
            publish(local, url)
        except StratagemError:
            raise
        except Exception as error:  # which class it is hangs on the file system
            notes = " ".join(getattr(error, "__notes__", ()))
            raise CheckpointError(
                f"{mask_text(url)}: the checkpoint could not be published: {error}. {notes}".rstrip()
            ) from error


def latest_remote(url: str) -> str | None:
    """Return the URL of the checkpoint that was published last in the folder that ``url`` names, or None."""
    published = list_published(url)
    return published[-1].url if published else None


def fetch_remote(url: str, cache: Path) -> Path:
    """Return the local copy of a checkpoint that was published at a URL, or of a single file that lies there.

    Raises:
        CheckpointNotFoundError: if there is neither.
        CheckpointDamagedError: if it is not what was published.
        CheckpointError: if the file is too large, or the place cannot be read.
    """
    try:
        try:
            return fetch_published(url, cache)
        except CheckpointNotFoundError:
            return _fetch_file(url, cache)
    except StratagemError:
        raise
    except Exception as error:  # which class it is hangs on the file system
        raise CheckpointError(f"{mask_text(url)} cannot be read: {error}.") from error


def _fetch_file(url: str, cache: Path) -> Path:
    """Fetch a file that something else put there; the copy counts as long as the file system says that it is the same."""
    place, name = RemoteFolder.parent_of(url)
    if name not in place.names():
        raise CheckpointNotFoundError(f"{mask_text(url)}: there is no such checkpoint.")
    size, limit = place.size(name), download_limit_bytes()
    if size > limit:
        raise CheckpointError(f"{mask_text(url)} has {size} bytes; at most {limit} are downloaded.")
    version = hashlib.sha256(f"{place.shown}/{name}@{place.version(name)}".encode()).hexdigest()[:12]
    copy = cache / f"{version}-{name}"
    if copy.is_file() and copy.stat().st_size == size:
        return copy
    cache.mkdir(parents=True, exist_ok=True)
    with place.reading(name) as stream, atomic_file(copy) as aside, aside.open("wb") as file:
        count = 0
        while count <= size and (chunk := stream.read(_CHUNK_BYTES)):
            count += file.write(chunk)
        if count != size:
            raise CheckpointError(f"{mask_text(url)}: {count} bytes came of {size}. Nothing was kept; try again.")
    return copy
