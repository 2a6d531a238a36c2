"""Save and load checkpoints at URLs that fsspec can open, such as ``s3://bucket/run/epoch_3``.

A checkpoint is first written to a local folder and then uploaded. To load one, it is first downloaded to the cache, where
its digests are compared.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from stratagem.checkpoint.catalog.inspection import inspect_checkpoint
from stratagem.checkpoint.catalog.order import SAVE_ORDER, SaveOrder, oldest_first
from stratagem.checkpoint.remote.download import download_limit_bytes
from stratagem.distributed import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointError, CheckpointNotFoundError, StratagemError
from stratagem.storage import RemoteFolder, atomic_file, download_once, fetch_published, list_published, publish
from stratagem.utils import mask_text

__all__ = ["fetch_remote", "find_latest_remote", "remote_save_orders", "save_remote"]

_CHUNK_BYTES = 4 << 20
_MOST_NAME_BYTES = 150


def save_remote(url: str, write: Callable[[Path], None], rank_group: RankGroup = SINGLE_PROCESS) -> None:
    """Call ``write`` with a local path, and publish the checkpoint that it writes at ``url``.

    Collective over ``rank_group``: ``write`` is called on every rank with the same path, in a temporary folder of the first
    rank, which then uploads the checkpoint. ``STRATAGEM_STAGING`` selects where the temporary folder is created.

    Raises:
        CheckpointError: if the ranks do not share the folder, or the upload fails; the previous checkpoint stays
            available.
    """
    folder = rank_group.run_on_rank0(_make_staging)
    local = folder / url.rstrip("/").rpartition("/")[2]
    try:
        rank_group.run_checked(lambda: _check_shared(folder))
        write(local)
        rank_group.run_on_rank0(lambda: _upload(local, url))
    finally:
        if rank_group.is_rank0:
            shutil.rmtree(folder, ignore_errors=True)


def _make_staging() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="stratagem-", dir=os.environ.get("STRATAGEM_STAGING")))
    except OSError as error:
        raise CheckpointError(
            f"Could not create a temporary folder: {error}. Set STRATAGEM_STAGING to a different folder."
        ) from error


def _check_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"This rank cannot see {folder}, which the first rank created. With ranks on several machines, set "
            "STRATAGEM_STAGING to a folder that all machines share."
        )


def _upload(local: Path, url: str) -> None:
    try:
        publish(local, url, _metadata(local))
    except StratagemError:
        raise
    except Exception as error:  # The error class depends on the file system.
        notes = " ".join(getattr(error, "__notes__", ()))
        raise CheckpointError(
            f"{mask_text(url)}: the checkpoint could not be uploaded: {error}. {notes}".rstrip()
        ) from error


def _metadata(local: Path) -> dict[str, Any]:
    """Return the metadata to publish with a checkpoint: the run that saved it, its save order, whether it is finite."""
    found = inspect_checkpoint(local)
    if found is None:
        return {}
    finite = {} if found.finite else {"finite": False}
    if found.run_id is None or found.order is None:
        return finite
    return {"run_id": found.run_id, SAVE_ORDER: found.order.as_meta(), **finite}


def find_latest_remote(url: str) -> str | None:
    """Return the URL of the newest checkpoint published in the folder at ``url``, or None if there is none.

    Among checkpoints of the same run, the newest is the checkpoint that was saved last, regardless of the order of
    uploads. Among different runs, it is the checkpoint that was uploaded last. Checkpoints with NaN or Inf in their
    weights are skipped.
    """
    return next((each.url for each in reversed(_remote_checkpoints(url)) if each.finite), None)


def remote_save_orders(url: str) -> list[SaveOrder]:
    """Return the save orders of the checkpoints published in the folder at ``url``.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    try:
        return [each.order for each in _remote_checkpoints(url) if each.order is not None]
    except StratagemError:
        raise
    except Exception as error:  # The error class depends on the file system.
        raise CheckpointError(f"{mask_text(url)} cannot be read: {error}.") from error


@final
@dataclass(frozen=True, slots=True)
class _RemoteCheckpoint:
    """A published checkpoint; ``saved_at`` is its index in the order of publication, independent of clocks."""

    url: str
    saved_at: float
    run_id: str | None
    order: SaveOrder | None
    finite: bool
    number: int = 0
    path: Path = Path()


def _remote_checkpoints(url: str) -> list[_RemoteCheckpoint]:
    """Return the checkpoints published in a folder, oldest first."""
    return oldest_first(
        _RemoteCheckpoint(each.url, float(index), *_identity(each.metadata), each.metadata.get("finite") is not False)
        for index, each in enumerate(list_published(url))
    )


def _identity(metadata: Mapping[str, Any]) -> tuple[str | None, SaveOrder | None]:
    run_id = metadata.get("run_id")
    try:
        order = SaveOrder.from_meta(metadata.get(SAVE_ORDER))
    except ValueError:
        return None, None
    return run_id if isinstance(run_id, str) else None, order


def fetch_remote(url: str, cache: Path) -> Path:
    """Return the local copy of the checkpoint published at ``url``, or of a plain file at this URL.

    Raises:
        CheckpointNotFoundError: if neither exists.
        CheckpointDamagedError: if the data does not match the published digests.
        CheckpointError: if the file is too large, or the file system reports an error.
    """
    try:
        try:
            return fetch_published(url, cache)
        except CheckpointNotFoundError:
            return _fetch_file(url, cache)
    except StratagemError:
        raise
    except Exception as error:  # The error class depends on the file system.
        raise CheckpointError(f"{mask_text(url)} cannot be read: {error}.") from error


def _fetch_file(url: str, cache: Path) -> Path:
    """Fetch a plain file; a cached copy is reused while the file system reports the same version."""
    folder, name = RemoteFolder.parent_of(url)
    if name not in folder.names():
        raise CheckpointNotFoundError(f"{mask_text(url)}: there is no such checkpoint.")
    size, limit = folder.size(name), download_limit_bytes()
    if size > limit:
        raise CheckpointError(f"{mask_text(url)} has {size} bytes; at most {limit} bytes are downloaded.")
    version = hashlib.sha256(f"{folder.masked_url}/{name}@{folder.version(name)}".encode()).hexdigest()[:12]
    # Keep the end of the name, which includes the suffix. The version as a prefix makes the name unique.
    copy = cache / f"{version}-{name.encode(errors='replace')[-_MOST_NAME_BYTES:].decode(errors='replace')}"
    cache.mkdir(parents=True, exist_ok=True)
    download_once(
        copy,
        lambda: copy.is_file() and copy.stat().st_size == size,
        lambda: _download_file(folder, name, size, copy),
    )
    return copy


def _download_file(folder: RemoteFolder, name: str, size: int, copy: Path) -> None:
    with folder.reading(name) as stream, atomic_file(copy) as temporary, temporary.open("wb") as file:
        count = 0
        while count <= size and (chunk := stream.read(_CHUNK_BYTES)):
            count += file.write(chunk)
        if count != size:
            raise CheckpointError(
                f"{folder.masked_url}/{name}: received {count} of {size} bytes. The partial file was removed; try again."
            )
