"""Local files that are written durably and published whole."""

from stratagem.storage import operations
from stratagem.storage.atomic import atomic_directory, atomic_file, write_atomic
from stratagem.storage.files import (
    begin_writeback,
    fsync_directory,
    fsync_file,
    fsync_tree,
    opened,
    read_bytes,
    remove,
    tree_bytes,
    write_bytes,
    write_fully,
)
from stratagem.storage.stale import Cleaned, clean_temporaries

__all__ = [
    "atomic_directory",
    "atomic_file",
    "begin_writeback",
    "Cleaned",
    "clean_temporaries",
    "fsync_directory",
    "fsync_file",
    "fsync_tree",
    "opened",
    "operations",
    "read_bytes",
    "remove",
    "tree_bytes",
    "write_atomic",
    "write_bytes",
    "write_fully",
]
