"""Checkpoints at places that fsspec opens, such as ``s3://bucket/run/epoch_3``.

A checkpoint is made on this machine as everywhere else, and then published there whole; reading one fetches it into the
cache first, where its digests are compared.
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
from stratagem.distributed import ALONE, Team
from stratagem.errors import CheckpointError, CheckpointNotFoundError, StratagemError
from stratagem.storage import RemoteFolder, atomic_file, fetch_published, list_published, publish
from stratagem.utils import mask_text

__all__ = ["fetch_remote", "find_latest_remote", "remote_save_orders", "save_remote"]

_CHUNK_BYTES = 4 << 20


def save_remote(url: str, write: Callable[[Path], None], team: Team = ALONE) -> None:
    """Have ``write`` make a checkpoint at a path of this machine, and publish that at the URL.

    Collective over ``team``: ``write`` is called on every rank with the same path, in a temporary folder of the first
    rank; then that one publishes. ``STRATAGEM_STAGING`` names where such folders are made.

    Raises:
        CheckpointError: if the ranks do not share the folder, or it cannot be published; what was published before
            still is.
    """
    folder = team.first(_make_staging)
    local = folder / url.rstrip("/").rpartition("/")[2]
    try:
        team.own(lambda: _check_shared(folder))
        write(local)
        team.first(lambda: _publish(local, url))
    finally:
        if team.leads:
            shutil.rmtree(folder, ignore_errors=True)


def _make_staging() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="stratagem-", dir=os.environ.get("STRATAGEM_STAGING")))
    except OSError as error:
        raise CheckpointError(f"No temporary folder can be made: {error}. Name one with STRATAGEM_STAGING.") from error


def _check_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}, made by the first rank, is not there for this one. Ranks on several machines need a folder that they "
            "share: name it with STRATAGEM_STAGING."
        )


def _publish(local: Path, url: str) -> None:
    try:
        publish(local, url, _about(local))
    except StratagemError:
        raise
    except Exception as error:  # which class it is hangs on the file system
        notes = " ".join(getattr(error, "__notes__", ()))
        raise CheckpointError(
            f"{mask_text(url)}: the checkpoint could not be published: {error}. {notes}".rstrip()
        ) from error


def _about(local: Path) -> dict[str, Any]:
    """Return what the record of a publication keeps of a checkpoint: the run that saved it, and its place in that."""
    found = inspect_checkpoint(local)
    if found is None:
        return {}
    finite = {} if found.finite else {"finite": False}
    if found.run_id is None or found.order is None:
        return finite
    return {"run_id": found.run_id, SAVE_ORDER: found.order.as_meta(), **finite}


def find_latest_remote(url: str) -> str | None:
    """Return the URL of the newest checkpoint that was published in the folder that ``url`` names, or None.

    Of the checkpoints of a run it is the one that the run saved last, in whatever order they were published; of several
    runs, and of checkpoints that a strategy saved without a run, the one that was published last. One whose weights are
    not all finite is skipped.
    """
    return next((each.url for each in reversed(_published_at(url)) if each.finite), None)


def remote_save_orders(url: str) -> list[SaveOrder]:
    """Return the places that the checkpoints published in a folder have among those of their runs.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    try:
        return [each.order for each in _published_at(url) if each.order is not None]
    except StratagemError:
        raise
    except Exception as error:  # the class depends on the file system
        raise CheckpointError(f"{mask_text(url)} cannot be read: {error}.") from error


@final
@dataclass(frozen=True, slots=True)
class _Published:
    """A published checkpoint; its time is its place among the publications, which no clock decides."""

    url: str
    saved_at: float
    run_id: str | None
    order: SaveOrder | None
    finite: bool
    number: int = 0
    path: Path = Path()


def _published_at(url: str) -> list[_Published]:
    """Return what is published in a folder, the oldest first."""
    return oldest_first(
        _Published(each.url, float(place), *_identity(each.about), each.about.get("finite") is not False)
        for place, each in enumerate(list_published(url))
    )


def _identity(about: Mapping[str, Any]) -> tuple[str | None, SaveOrder | None]:
    run_id = about.get("run_id")
    try:
        order = SaveOrder.from_meta(about.get(SAVE_ORDER))
    except ValueError:
        return None, None
    return run_id if isinstance(run_id, str) else None, order


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
