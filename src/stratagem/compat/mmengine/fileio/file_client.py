"""The former interface of the back ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.fileio.backends import (
    HTTPBackend,
    LmdbBackend,
    LocalBackend,
    MemcachedBackend,
    PetrelBackend,
)
from stratagem.compat.mmengine.fileio.backends.registry_utils import as_prefixes, check_backend
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.utils import did_you_mean

__all__ = ["FileClient", "HardDiskBackend"]


class HardDiskBackend(LocalBackend):
    """The former name of ``LocalBackend``."""


class FileClient:
    """Access files with a back end; clients with the same arguments are one object. Use the functions of the package instead.

    Args:
        backend: the name of the back end: ``"disk"``, ``"http"``, ``"lmdb"``, ``"memcached"`` or ``"petrel"``.
        prefix: the prefix of addresses that selects the back end instead.
        kwargs: the arguments of the back end.

    Raises:
        ValueError: if the name or the prefix is unknown.
    """

    _backends: ClassVar[dict[str, Any]] = {
        "disk": HardDiskBackend,
        "memcached": MemcachedBackend,
        "lmdb": LmdbBackend,
        "petrel": PetrelBackend,
        "http": HTTPBackend,
    }
    _prefix_to_backends: ClassVar[dict[str, Any]] = {
        "s3": PetrelBackend,
        "petrel": PetrelBackend,
        "http": HTTPBackend,
        "https": HTTPBackend,
    }
    _instances: ClassVar[dict[str, Any]] = {}

    client: Any

    def __new__(cls, backend: str | None = None, prefix: str | None = None, **kwargs: Any) -> Any:
        if backend is None and prefix is None:
            backend = "disk"
        if backend is not None and backend not in cls._backends:
            raise ConfigValueError(f"Backend {backend!r} is not supported. {did_you_mean(backend, cls._backends)}")
        if prefix is not None and prefix not in cls._prefix_to_backends:
            raise ConfigValueError(
                f"prefix {prefix!r} is not supported. {did_you_mean(prefix, cls._prefix_to_backends)}"
            )
        key = ":".join([str(backend), str(prefix), *(f"{name}:{value}" for name, value in kwargs.items())])
        if key not in cls._instances:
            self = super().__new__(cls)
            kind = cls._backends[backend] if backend is not None else cls._prefix_to_backends[str(prefix)]
            self.client = kind(**kwargs)
            cls._instances[key] = self
        return cls._instances[key]

    @property
    def name(self) -> str:
        """The name of the back end's class."""
        return str(self.client.name)

    @property
    def allow_symlink(self) -> bool:
        """Whether the back end supports symbolic links."""
        return bool(self.client.allow_symlink)

    @staticmethod
    def parse_uri_prefix(uri: str | Path) -> str | None:
        """Return the prefix of an address, such as ``"s3"``; None for a path.

        Raises:
            AssertionError: if it is neither a string nor a path.
        """
        if not isinstance(uri, str | Path):
            raise InvalidArgumentError(f"The address must be a string or a Path, got {uri!r}.")
        prefix, separator, _ = str(uri).partition("://")
        return prefix.rpartition(":")[2] if separator else None

    @classmethod
    def infer_client(
        cls, file_client_args: Mapping[str, Any] | None = None, uri: str | Path | None = None
    ) -> FileClient:
        """Return the client with these arguments, or the one for an address.

        Raises:
            AssertionError: if neither is given.
        """
        client: FileClient
        if file_client_args is not None:
            client = cls(**file_client_args)
        else:
            require(uri is not None, "Neither file_client_args nor an address is given.")
            client = cls(prefix=cls.parse_uri_prefix(uri or ""))
        return client

    @classmethod
    def register_backend(
        cls,
        name: str,
        backend: type[Any] | None = None,
        force: bool = False,
        prefixes: str | list[str] | tuple[str, ...] | None = None,
    ) -> Any:
        """Register a back end, as a decorator or with ``backend``; see ``register_backend`` of the package.

        Raises:
            TypeError: if the name is not a string, or the class is not a back end.
            KeyError: if the name or a prefix is registered already.
        """
        if backend is None:

            def decorate(kind: type[Any]) -> type[Any]:
                cls._register(name, kind, force, prefixes)
                return kind

            return decorate
        cls._register(name, backend, force, prefixes)
        return None

    @classmethod
    def _register(cls, name: str, backend: type[Any], force: bool, prefixes: Any) -> None:
        check_backend(name, backend)
        prefixes = as_prefixes(prefixes)
        taken = [name] if name in cls._backends else [item for item in prefixes if item in cls._prefix_to_backends]
        if taken and not force:
            raise ConfigKeyError(
                f'{taken[0]} is already registered as a storage backend, add "force=True" if you want to override it'
            )
        replaced = [cls._backends.get(name), *(cls._prefix_to_backends.get(prefix) for prefix in prefixes)]
        classes = tuple(kind for kind in replaced if kind is not None)
        for key, instance in list(cls._instances.items()):
            if isinstance(instance.client, classes):
                del cls._instances[key]
        cls._backends[name] = backend
        cls._prefix_to_backends.update(dict.fromkeys(prefixes, backend))

    def get(self, filepath: str | Path) -> Any:
        """Return the content of a file as bytes."""
        return self.client.get(filepath)

    def get_text(self, filepath: str | Path, encoding: str = "utf-8") -> Any:
        """Return the content of a text file."""
        return self.client.get_text(filepath, encoding)

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file."""
        self.client.put(obj, filepath)

    def put_text(self, obj: str, filepath: str | Path) -> None:
        """Write a text file."""
        self.client.put_text(obj, filepath)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file."""
        self.client.remove(filepath)

    def exists(self, filepath: str | Path) -> Any:
        """Return whether there is a file or folder."""
        return self.client.exists(filepath)

    def isdir(self, filepath: str | Path) -> Any:
        """Return whether there is a folder."""
        return self.client.isdir(filepath)

    def isfile(self, filepath: str | Path) -> Any:
        """Return whether there is a file."""
        return self.client.isfile(filepath)

    def join_path(self, filepath: str | Path, *filepaths: str | Path) -> Any:
        """Return the joined path."""
        return self.client.join_path(filepath, *filepaths)

    @contextmanager
    def get_local_path(self, filepath: str | Path) -> Iterator[str]:
        """Yield the path of the file, or of a temporary copy."""
        with self.client.get_local_path(str(filepath)) as path:
            yield path

    def list_dir_or_file(
        self,
        dir_path: str | Path,
        list_dir: bool = True,
        list_file: bool = True,
        suffix: str | tuple[str, ...] | None = None,
        recursive: bool = False,
    ) -> Iterator[str]:
        """Return an iterator over the paths in a folder, relative to it."""
        yield from self.client.list_dir_or_file(dir_path, list_dir, list_file, suffix, recursive)
