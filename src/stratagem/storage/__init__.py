"""Write files durably and publish them atomically, on local disks and on remote file systems without a rename."""

from stratagem.storage import operations
from stratagem.storage.atomic import atomic_directory, atomic_file, write_atomic, write_record
from stratagem.storage.download_once import download_once
from stratagem.storage.files import (
    begin_writeback,
    closing_descriptor,
    fsync_directory,
    fsync_file,
    fsync_tree,
    is_same_file,
    open_for_reading,
    read_at,
    read_bytes,
    remove,
    tree_bytes,
    write_bytes,
    write_fully,
)
from stratagem.storage.hosts import is_link_local, is_loopback
from stratagem.storage.object_store import (
    Published,
    clean_unpublished,
    fetch_published,
    list_published,
    publish,
    remove_published,
)
from stratagem.storage.remote import RemoteFolder, is_remote_scheme
from stratagem.storage.stale import CleanupResult, clean_temporaries

__all__ = [
    "atomic_directory",
    "atomic_file",
    "begin_writeback",
    "CleanupResult",
    "Published",
    "RemoteFolder",
    "clean_temporaries",
    "clean_unpublished",
    "download_once",
    "fetch_published",
    "fsync_directory",
    "fsync_file",
    "fsync_tree",
    "is_same_file",
    "is_link_local",
    "is_loopback",
    "is_remote_scheme",
    "list_published",
    "closing_descriptor",
    "open_for_reading",
    "operations",
    "publish",
    "read_at",
    "read_bytes",
    "remove",
    "remove_published",
    "tree_bytes",
    "write_atomic",
    "write_bytes",
    "write_fully",
    "write_record",
]
