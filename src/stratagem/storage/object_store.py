"""Publish files to places that have no rename, so that whoever looks finds all of it or nothing.

Every publication writes to a folder of its own (a :class:`Generation`), and its record last. Nothing that exists is
ever overwritten, so there is no instant at which the earlier content is gone and the new one not there:

====================================  ========================  ===============================================
killed, or failed                     found under the name      left behind
====================================  ========================  ===============================================
while files are written               the old, or nothing       files without a record, which count for nothing
while the record is written           the old, or nothing       the same: a part of a record is no record
after the record                      the new                   older generations, which the newer hides
====================================  ========================  ===============================================

What is left behind goes at the next publication under the name, or with :func:`clean_unpublished`. What is removed
loses its record first, and the oldest goes first, so an older content never comes back.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from stratagem.errors import CheckpointDamagedError, CheckpointNotFoundError
from stratagem.storage.atomic import atomic_directory
from stratagem.storage.publication import RECORD, Generation, PublicationRecord, StoredFile
from stratagem.storage.remote import RemoteFolder

__all__ = ["Published", "clean_unpublished", "fetch_published", "list_published", "publish", "remove_published"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_LARGEST_RECORD_BYTES = 64 << 20
_ATTEMPTS = 3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Something that was published: ``url`` to fetch it by, when (seconds since the epoch), and its bytes.

    The URL may hold secrets that the place's own URL had. ``about`` is what the publisher recorded about it.
    """

    name: str
    url: str = field(repr=False)
    published_at: float
    size: int
    about: Mapping[str, Any] = field(default_factory=dict)


def publish(local: Path, url: str, about: Mapping[str, Any] | None = None) -> Published:
    """Publish a local file, or a folder with all below it, under a URL; it replaces what was published there before.

    One process writes under a name at a time; of two, the later to begin wins.

    Args:
        local: the file or folder.
        url: where to.
        about: recorded with it, for :func:`list_published`; plain JSON values.

    Raises:
        MissingDependencyError: if the file system's package is not installed.
        ValueError: if a file's name could not be read back.
        OSError: if the place refuses, or what the file system's own library raises then. What was published before is
            still there.
    """
    place, name = RemoteFolder.parent_of(url)
    present = _generations(place)
    older = [generation for generation in present if generation.name == name]
    # Later than those of other names as well, so that the last publication of the place is known without a clock.
    generation = Generation.after(name, present)
    target = place.folder(generation.folder)
    try:
        record = _upload(local, target, about or {})
    except Exception as error:
        error.add_note(f"While publishing {target.shown}; what was published as {name} before is untouched.")
        with suppress(Exception):  # the place is failing; a later publication cleans up
            _remove(place, generation)
        raise
    for old in sorted(older):
        try:
            _remove(place, old)
        except Exception as error:  # noqa: BLE001 -- the new one is safe, and which class it is hangs on the file system
            logger.warning("%s/%s is superseded but could not be removed: %s", place.shown, old.folder, error)
            break  # or an older one could outlive a newer
    return _described(place, generation, record)


def list_published(url: str) -> list[Published]:
    """Return what is published in the folder that a URL names, the latest last; empty where there is no such folder."""
    place = RemoteFolder.at(url.rstrip("/"))
    return [_described(place, generation, record) for generation, record in _newest(place)]


def fetch_published(url: str, cache: Path) -> Path:
    """Return the local copy, in ``cache``, of what is published under a URL: a file or a folder of the same name.

    A copy that is there is compared with its digests, and fetched again where it differs.

    Raises:
        CheckpointNotFoundError: if nothing is published there.
        CheckpointDamagedError: if a file is missing, or is not what was published.
    """
    place, name = RemoteFolder.parent_of(url)
    for attempt in range(_ATTEMPTS):
        found = [(generation, record) for generation, record in _newest(place) if generation.name == name]
        if not found:
            raise CheckpointNotFoundError(f"{place.shown}/{name}: nothing is published under this name.")
        ((generation, record),) = found
        source = place.folder(generation.folder)
        where = cache / f"{hashlib.sha256(source.shown.encode()).hexdigest()[:12]}-{generation.folder}"
        copy = where / name
        try:
            if not _is_whole(copy, record):
                _download(source, record, where, name)
        except FileNotFoundError as error:
            if attempt == _ATTEMPTS - 1:
                raise CheckpointDamagedError(f"{source.shown}: a file is missing: {error}.") from error
            continue  # it was replaced meanwhile: look again
        return copy
    raise AssertionError("the last attempt returns or raises")


def remove_published(url: str) -> None:
    """Remove what is published under a URL, and all that its name left behind there; nothing there is fine."""
    place, name = RemoteFolder.parent_of(url)
    for generation in sorted(_generations(place)):
        if generation.name == name:
            _remove(place, generation)


def clean_unpublished(url: str) -> list[str]:
    """Remove from the folder that a URL names what killed publications left, and return the names of those.

    Only folders of our own form are touched. Call it where one run owns the folder: what another one is writing at the
    moment looks the same.
    """
    place = RemoteFolder.at(url.rstrip("/"))
    published = {generation for generation, _ in _newest(place)}
    left = [generation for generation in sorted(_generations(place)) if generation not in published]
    for generation in left:
        _remove(place, generation)
    return [generation.folder for generation in left]


def _generations(place: RemoteFolder) -> list[Generation]:
    return [generation for name in place.names() if (generation := Generation.parse(name))]


def _newest(place: RemoteFolder) -> Iterator[tuple[Generation, PublicationRecord]]:
    """Yield, for each name, its latest generation that has a record; by when they began, the latest last."""
    latest: dict[str, tuple[Generation, PublicationRecord]] = {}
    for generation in sorted(_generations(place), reverse=True):
        if generation.name in latest:
            continue
        record = PublicationRecord.parse(place.folder(generation.folder).read(RECORD, _LARGEST_RECORD_BYTES) or b"")
        if record is not None:
            latest[generation.name] = generation, record
    yield from sorted(latest.values(), key=lambda found: found[0].stamp)


def _upload(local: Path, target: RemoteFolder, about: Mapping[str, Any]) -> PublicationRecord:
    files = {}
    for file in sorted(local.rglob("*")) if local.is_dir() else [local]:
        if file.is_dir():
            continue
        path = file.relative_to(local if local.is_dir() else local.parent).as_posix()
        target.make(path.rpartition("/")[0])
        files[path] = _upload_file(file, target, path)
    record = PublicationRecord(files=files, is_folder=local.is_dir(), published_at=time.time(), about=about)
    data = record.encode()
    # Its own reader must take it: names that it refuses would make a publication that cannot be found.
    if PublicationRecord.parse(data) is None:
        raise ValueError(f"{local} has names of files that cannot be published: {sorted(files)[:5]}.")
    target.write(RECORD, data)
    if target.read(RECORD, _LARGEST_RECORD_BYTES) != data:
        raise OSError(f"{target.shown}/{RECORD} is not what was written there.")
    return record


def _upload_file(file: Path, target: RemoteFolder, path: str) -> StoredFile:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as source, target.writing(path) as sink:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
            size += len(chunk)
    stored = target.size(path)
    if stored != size:
        raise OSError(f"{target.shown}/{path} has {stored} bytes, but {size} were written.")
    return StoredFile(size, digest.hexdigest())


def _download(source: RemoteFolder, record: PublicationRecord, where: Path, name: str) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    # A copy that was changed is replaced in one step: another process may be reading one that was fetched meanwhile.
    with atomic_directory(where) as aside:
        root = aside / name if record.is_folder else aside
        root.mkdir(exist_ok=True)
        for path, due in record.files.items():
            file = root / path if record.is_folder else root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            _download_file(source, path, file, due)


def _download_file(source: RemoteFolder, path: str, file: Path, due: StoredFile) -> None:
    digest, size = hashlib.sha256(), 0
    with source.reading(path) as stream, file.open("wb") as sink:
        # One byte more than is due shows that there is more; an endless stream is not followed.
        while chunk := stream.read(min(_CHUNK_BYTES, due.size + 1 - size)):
            digest.update(chunk)
            size += sink.write(chunk)
            if size > due.size:
                break
    if size != due.size or digest.hexdigest() != due.sha256:
        raise CheckpointDamagedError(f"{source.shown}/{path} is not what was published: its size or digest differs.")


def _is_whole(copy: Path, record: PublicationRecord) -> bool:
    return all(_has(copy / path if record.is_folder else copy, due) for path, due in record.files.items()) and (
        copy.is_dir() == record.is_folder
    )


def _has(file: Path, due: StoredFile) -> bool:
    if not file.is_file() or file.stat().st_size != due.size:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == due.sha256


def _remove(place: RemoteFolder, generation: Generation) -> None:
    """Remove one generation, its record first: from then on it counts for nothing, whenever this ends."""
    folder = place.folder(generation.folder)
    folder.remove(RECORD)
    for path in folder.paths():
        folder.remove(path)
    folder.remove_empty_folders()


def _described(place: RemoteFolder, generation: Generation, record: PublicationRecord) -> Published:
    return Published(
        name=generation.name,
        url=f"{place.url}/{generation.name}",
        published_at=record.published_at,
        size=record.size,
        about=record.about,
    )
