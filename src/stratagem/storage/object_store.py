"""Publish files atomically to file systems without a rename, such as object stores.

Each publication writes its files to a new folder (a :class:`Generation`), and then a record that makes it visible. Nothing
is overwritten, so either the old or the new contents are visible at any time:

====================================  ==================  ===================================================
killed or failed                      visible contents    left behind
====================================  ==================  ===================================================
while files are written               old, or nothing     files without a record, which are ignored
while the record is written           old, or nothing     the same; an incomplete record is ignored
after the record is written           new                 older generations, which the newer one supersedes
====================================  ==================  ===================================================

The next publication under the same name, or :func:`clean_unpublished`, removes what is left behind. Removal starts with the
oldest generation and with its record, so that old contents never become visible again.
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
from stratagem.storage.download_once import download_once
from stratagem.storage.publication import RECORD, Generation, PublicationRecord, StoredFile
from stratagem.storage.remote import RemoteFolder

__all__ = ["Published", "clean_unpublished", "fetch_published", "list_published", "publish", "remove_published"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_MAX_RECORD_BYTES = 64 << 20
_MAX_ATTEMPTS = 3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published file or folder: its URL, time of publication (seconds since the epoch) and size in bytes.

    The URL may contain the secrets of the URL that it was listed from. ``metadata`` contains the values that the publisher
    recorded.
    """

    name: str
    url: str = field(repr=False)
    published_at: float
    size: int
    metadata: Mapping[str, Any] = field(default_factory=dict)


def publish(local: Path, url: str, metadata: Mapping[str, Any] | None = None) -> Published:
    """Publish a local file or folder at ``url``; it replaces the previous publication.

    Only one process may publish under a name at a time; otherwise, the process that started last wins.

    Args:
        local: the file or folder.
        url: the target.
        metadata: plain JSON values to record with the publication; :func:`list_published` returns them.

    Raises:
        MissingDependencyError: if the package for the file system is not installed.
        ValueError: if a file has an unsupported name.
        OSError: or an error of the file system's library, if the upload fails. The previous publication stays available.
    """
    folder, name = RemoteFolder.parent_of(url)
    existing = _generations(folder)
    previous = [generation for generation in existing if generation.name == name]
    # The new generation is later than all generations in the folder, so that publications are ordered without a clock.
    generation = Generation.after(name, existing)
    target = folder.subfolder(generation.folder_name)
    try:
        record = _upload(local, target, metadata or {})
    except Exception as error:
        error.add_note(f"While publishing {target.masked_url}; the previous publication of {name} is unchanged.")
        with suppress(Exception):  # The file system may be failing; a later publication cleans up.
            _remove(folder, generation)
        raise
    for old in sorted(previous):
        try:
            _remove(folder, old)
        except Exception as error:  # noqa: BLE001 -- each file system raises other classes
            logger.warning(
                "Could not remove the superseded publication %s/%s: %s", folder.masked_url, old.folder_name, error
            )
            break  # Otherwise, an older generation could outlive a newer one.
    return _describe(folder, generation, record)


def list_published(url: str) -> list[Published]:
    """Return the publications in the folder at ``url``, latest last; empty if the folder does not exist."""
    folder = RemoteFolder.at(url.rstrip("/"))
    return [_describe(folder, generation, record) for generation, record in _newest(folder)]


def fetch_published(url: str, cache: Path) -> Path:
    """Return the local copy, in ``cache``, of the file or folder published at ``url``.

    An existing copy is compared with the recorded digests and downloaded again if it differs.

    Raises:
        CheckpointNotFoundError: if nothing is published at ``url``.
        CheckpointDamagedError: if a file is missing or corrupted.
    """
    folder, name = RemoteFolder.parent_of(url)
    for attempt in range(_MAX_ATTEMPTS):
        found = [(generation, record) for generation, record in _newest(folder) if generation.name == name]
        if not found:
            raise CheckpointNotFoundError(f"{folder.masked_url}/{name}: nothing is published under this name.")
        ((generation, record),) = found
        source = folder.subfolder(generation.folder_name)
        copy_folder = cache / f"{hashlib.sha256(source.masked_url.encode()).hexdigest()[:12]}-{generation.folder_name}"
        copy = copy_folder / name
        try:
            _fetch(source, record, copy_folder, name)
        except FileNotFoundError as error:
            if attempt == _MAX_ATTEMPTS - 1:
                raise CheckpointDamagedError(f"{source.masked_url}: a file is missing: {error}.") from error
            continue  # The publication was replaced in the meantime, so list the folder again.
        return copy
    raise AssertionError("the last attempt returns or raises")


def remove_published(url: str) -> None:
    """Remove the publication at ``url`` and everything left behind under its name, if anything."""
    folder, name = RemoteFolder.parent_of(url)
    for generation in sorted(_generations(folder)):
        if generation.name == name:
            _remove(folder, generation)


def clean_unpublished(url: str) -> list[str]:
    """Remove files that interrupted publications left in the folder at ``url``; return the names of the removed folders.

    Other files are not touched. Call this only if a single run uses the folder, because a publication in progress cannot be
    distinguished from an interrupted one.
    """
    folder = RemoteFolder.at(url.rstrip("/"))
    published = {generation for generation, _ in _newest(folder)}
    unpublished = [generation for generation in sorted(_generations(folder)) if generation not in published]
    for generation in unpublished:
        _remove(folder, generation)
    return [generation.folder_name for generation in unpublished]


def _generations(folder: RemoteFolder) -> list[Generation]:
    return [generation for name in folder.names() if (generation := Generation.parse(name))]


def _newest(folder: RemoteFolder) -> Iterator[tuple[Generation, PublicationRecord]]:
    """Yield the latest generation with a record for each name, in the order of publication."""
    latest: dict[str, tuple[Generation, PublicationRecord]] = {}
    for generation in sorted(_generations(folder), reverse=True):
        if generation.name in latest:
            continue
        record = PublicationRecord.parse(
            folder.subfolder(generation.folder_name).read(RECORD, _MAX_RECORD_BYTES) or b""
        )
        if record is not None:
            latest[generation.name] = generation, record
    yield from sorted(latest.values(), key=lambda found: found[0].stamp)


def _upload(local: Path, target: RemoteFolder, metadata: Mapping[str, Any]) -> PublicationRecord:
    files = {}
    for file in sorted(local.rglob("*")) if local.is_dir() else [local]:
        if file.is_dir():
            continue
        path = file.relative_to(local if local.is_dir() else local.parent).as_posix()
        target.create(path.rpartition("/")[0])
        files[path] = _upload_file(file, target, path)
    record = PublicationRecord(files=files, is_folder=local.is_dir(), published_at=time.time(), metadata=metadata)
    data = record.encode()
    # Check that the record can be parsed: a publication with unsupported file names could not be found again.
    if PublicationRecord.parse(data) is None:
        raise ValueError(f"{local} contains files with names that cannot be published: {sorted(files)[:5]}.")
    target.write(RECORD, data)
    if target.read(RECORD, _MAX_RECORD_BYTES) != data:
        raise OSError(f"{target.masked_url}/{RECORD} does not contain the data that was written.")
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
        raise OSError(f"{target.masked_url}/{path} has {stored} bytes, but {size} were written.")
    return StoredFile(size, digest.hexdigest())


def _fetch(source: RemoteFolder, record: PublicationRecord, copy_folder: Path, name: str) -> None:
    copy_folder.parent.mkdir(parents=True, exist_ok=True)
    download_once(
        copy_folder,
        lambda: _is_complete(copy_folder / name, record),
        lambda: _download(source, record, copy_folder, name),
    )


def _download(source: RemoteFolder, record: PublicationRecord, copy_folder: Path, name: str) -> None:
    # A modified copy is replaced atomically, because another process may be reading its own download.
    with atomic_directory(copy_folder) as temporary:
        root = temporary / name if record.is_folder else temporary
        root.mkdir(exist_ok=True)
        for path, expected in record.files.items():
            file = root / path if record.is_folder else root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            _download_file(source, path, file, expected)


def _download_file(source: RemoteFolder, path: str, file: Path, expected: StoredFile) -> None:
    digest, size = hashlib.sha256(), 0
    with source.reading(path) as stream, file.open("wb") as sink:
        # Read at most one byte more than expected, so that an endless stream is detected.
        while chunk := stream.read(min(_CHUNK_BYTES, expected.size + 1 - size)):
            digest.update(chunk)
            size += sink.write(chunk)
            if size > expected.size:
                break
    if size != expected.size or digest.hexdigest() != expected.sha256:
        raise CheckpointDamagedError(
            f"{source.masked_url}/{path} is corrupted: its size or digest does not match the record."
        )


def _is_complete(copy: Path, record: PublicationRecord) -> bool:
    return all(
        _matches(copy / path if record.is_folder else copy, expected) for path, expected in record.files.items()
    ) and (copy.is_dir() == record.is_folder)


def _matches(file: Path, expected: StoredFile) -> bool:
    if not file.is_file() or file.stat().st_size != expected.size:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == expected.sha256


def _remove(folder: RemoteFolder, generation: Generation) -> None:
    """Remove one generation, starting with its record, so that it is ignored from then on."""
    generation_folder = folder.subfolder(generation.folder_name)
    generation_folder.remove(RECORD)
    for path in generation_folder.paths():
        generation_folder.remove(path)
    generation_folder.remove_empty_folders()


def _describe(folder: RemoteFolder, generation: Generation, record: PublicationRecord) -> Published:
    return Published(
        name=generation.name,
        url=f"{folder.url}/{generation.name}",
        published_at=record.published_at,
        size=record.size,
        metadata=record.metadata,
    )
