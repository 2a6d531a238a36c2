"""The back ends by name, and by the prefix of addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.fileio.backends.base import BaseStorageBackend
from stratagem.compat.mmengine.fileio.backends.http_backend import HTTPBackend
from stratagem.compat.mmengine.fileio.backends.lmdb_backend import LmdbBackend
from stratagem.compat.mmengine.fileio.backends.local_backend import LocalBackend
from stratagem.compat.mmengine.fileio.backends.memcached_backend import MemcachedBackend
from stratagem.compat.mmengine.fileio.backends.petrel_backend import PetrelBackend
from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["as_prefixes", "backends", "check_backend", "prefix_to_backends", "register_backend"]

BackendClass = type[BaseStorageBackend]

backends: dict[str, Any] = {}
prefix_to_backends: dict[str, Any] = {}


@overload
def register_backend(
    name: str, backend: None = ..., force: bool = ..., prefixes: str | Sequence[str] | None = ...
) -> Callable[[BackendClass], BackendClass]: ...


@overload
def register_backend(
    name: str, backend: BackendClass, force: bool = ..., prefixes: str | Sequence[str] | None = ...
) -> None: ...


def register_backend(
    name: str, backend: BackendClass | None = None, force: bool = False, prefixes: str | Sequence[str] | None = None
) -> Callable[[BackendClass], BackendClass] | None:
    """Register a back end, as a decorator or with ``backend``.

    Args:
        name: its name.
        backend: the class.
        force: whether it replaces one with the same name or prefix.
        prefixes: the prefixes of addresses that it reads, such as ``"s3"``.

    Raises:
        TypeError: if the name is not a string, or the class is not a back end.
        ValueError: if the name or a prefix is registered already.
    """
    if backend is None:

        def decorate(cls: BackendClass) -> BackendClass:
            _register(name, cls, force, prefixes)
            return cls

        return decorate
    _register(name, backend, force, prefixes)
    return None


def check_backend(name: object, backend: object) -> None:
    """Check a name and a class.

    Raises:
        TypeError: if the name is not a string, or the class is not a back end.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"the backend name should be a string, but got {type(name)}")
    if not isinstance(backend, type):
        raise ConfigTypeError(f"backend should be a class, but got {type(backend)}")
    if not issubclass(backend, BaseStorageBackend):
        raise ConfigTypeError(f"backend {backend} is not a subclass of BaseStorageBackend")


def as_prefixes(prefixes: Any) -> list[str]:
    """Return a list of prefixes from None, one or several.

    Raises:
        AssertionError: if it is something else.
    """
    if isinstance(prefixes, str):
        return [prefixes]
    require(
        prefixes is None or isinstance(prefixes, list | tuple), f"prefixes must be a list or tuple, got {prefixes!r}."
    )
    return list(prefixes or ())


def _register(name: str, backend: BackendClass, force: bool, prefixes: Any) -> None:
    check_backend(name, backend)
    prefixes = as_prefixes(prefixes)
    taken = [name] if name in backends else [prefix for prefix in prefixes if prefix in prefix_to_backends]
    if taken and not force:
        raise ConfigValueError(
            f'{taken[0]} is already registered as a storage backend, add "force=True" if you want to override it'
        )
    backends[name] = backend
    prefix_to_backends.update(dict.fromkeys(prefixes, backend))


register_backend("local", LocalBackend, prefixes="")
register_backend("memcached", MemcachedBackend)
register_backend("lmdb", LmdbBackend)
register_backend("petrel", PetrelBackend, prefixes=["petrel", "s3"])
register_backend("http", HTTPBackend, prefixes=["http", "https"])
