"""Where files are stored: on the local file system, on servers, in object stores and databases."""

from stratagem.compat.mmengine.fileio.backends.base import BaseStorageBackend
from stratagem.compat.mmengine.fileio.backends.http_backend import HTTPBackend
from stratagem.compat.mmengine.fileio.backends.lmdb_backend import LmdbBackend
from stratagem.compat.mmengine.fileio.backends.local_backend import LocalBackend
from stratagem.compat.mmengine.fileio.backends.memcached_backend import MemcachedBackend
from stratagem.compat.mmengine.fileio.backends.petrel_backend import PetrelBackend
from stratagem.compat.mmengine.fileio.backends.registry_utils import backends, prefix_to_backends, register_backend

__all__ = [
    "BaseStorageBackend",
    "HTTPBackend",
    "LmdbBackend",
    "LocalBackend",
    "MemcachedBackend",
    "PetrelBackend",
    "backends",
    "prefix_to_backends",
    "register_backend",
]
