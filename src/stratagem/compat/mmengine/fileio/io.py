"""Read, write and manage files in any back end, which the address or ``backend_args`` selects.

``backend_args`` contains ``backend``, the name of a back end, and its arguments. Without it, the prefix of the address selects
the back end: none for local files, or such as ``s3://`` and ``https://``. What a back end does not support raises an
``AttributeError``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from stratagem.compat.mmengine.fileio.backends import backends, prefix_to_backends
from stratagem.compat.mmengine.fileio.file_client import FileClient
from stratagem.compat.mmengine.fileio.handlers import BaseFileHandler, file_handlers
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.utils import did_you_mean

__all__ = [
    "copy_if_symlink_fails",
    "copyfile",
    "copyfile_from_local",
    "copyfile_to_local",
    "copytree",
    "copytree_from_local",
    "copytree_to_local",
    "dump",
    "exists",
    "generate_presigned_url",
    "get",
    "get_file_backend",
    "get_local_path",
    "get_text",
    "isdir",
    "isfile",
    "join_path",
    "list_dir_or_file",
    "load",
    "put",
    "put_text",
    "remove",
    "rmtree",
]

Address = str | Path
Arguments = Mapping[str, Any] | None

backend_instances: dict[str, Any] = {}


def _parse_uri_prefix(uri: Any) -> str:
    return FileClient.parse_uri_prefix(uri) or ""


def get_file_backend(
    uri: Address | None = None, *, backend_args: Arguments = None, enable_singleton: bool = False
) -> Any:
    """Return the back end for an address.

    Args:
        uri: the address; may be None if ``backend_args`` names the back end.
        backend_args: the name and the arguments of the back end.
        enable_singleton: whether to return the same object for the same arguments.

    Raises:
        ValueError: if neither is given, or the back end is unknown.
    """
    arguments = dict(backend_args or {})
    if uri is None and "backend" not in arguments:
        raise ConfigValueError('uri should not be None when "backend" does not exist in backend_args')
    prefix = "" if uri is None else _parse_uri_prefix(uri)
    key = f"{prefix}:{json.dumps(arguments, default=repr) if arguments else '{}'}"
    if enable_singleton and key in backend_instances:
        return backend_instances[key]
    if "backend" in arguments:
        backend = _known(arguments.pop("backend"), backends, "back end")(**arguments)
    else:
        backend = _known(prefix, prefix_to_backends, "prefix of addresses")(**arguments)
    if enable_singleton:
        backend_instances[key] = backend
    return backend


def _known(name: str, table: dict[str, Any], what: str) -> Any:
    if name not in table:
        raise ConfigValueError(f"Unknown {what} {name!r}. {did_you_mean(str(name), table)}")
    return table[name]


def _backend(address: Address, backend_args: Arguments) -> Any:
    return get_file_backend(address, backend_args=backend_args, enable_singleton=True)


def get(filepath: Address, backend_args: Arguments = None) -> Any:
    """Return the content of a file as bytes."""
    return _backend(filepath, backend_args).get(filepath)


def get_text(filepath: Address, encoding: str = "utf-8", backend_args: Arguments = None) -> Any:
    """Return the content of a text file."""
    return _backend(filepath, backend_args).get_text(filepath, encoding)


def put(obj: bytes, filepath: Address, backend_args: Arguments = None) -> None:
    """Write a file; its folder is created if needed."""
    _backend(filepath, backend_args).put(obj, filepath)


def put_text(obj: str, filepath: Address, backend_args: Arguments = None) -> None:
    """Write a text file; its folder is created if needed."""
    _backend(filepath, backend_args).put_text(obj, filepath)


def exists(filepath: Address, backend_args: Arguments = None) -> Any:
    """Return whether there is a file or folder."""
    return _backend(filepath, backend_args).exists(filepath)


def isdir(filepath: Address, backend_args: Arguments = None) -> Any:
    """Return whether there is a folder."""
    return _backend(filepath, backend_args).isdir(filepath)


def isfile(filepath: Address, backend_args: Arguments = None) -> Any:
    """Return whether there is a file."""
    return _backend(filepath, backend_args).isfile(filepath)


def join_path(filepath: Address, *filepaths: Address, backend_args: Arguments = None) -> Any:
    """Return the joined path."""
    return _backend(filepath, backend_args).join_path(filepath, *filepaths)


def copyfile(src: Address, dst: Address, backend_args: Arguments = None) -> Any:
    """Copy a file within the back end of ``src``; return the path of the copy."""
    return _backend(src, backend_args).copyfile(src, dst)


def copytree(src: Address, dst: Address, backend_args: Arguments = None) -> Any:
    """Copy a folder within the back end of ``src``; return the path of the copy."""
    return _backend(src, backend_args).copytree(src, dst)


def copyfile_from_local(src: Address, dst: Address, backend_args: Arguments = None) -> Any:
    """Copy a local file to the back end of ``dst``; return the path of the copy."""
    return _backend(dst, backend_args).copyfile_from_local(src, dst)


def copytree_from_local(src: Address, dst: Address, backend_args: Arguments = None) -> Any:
    """Copy a local folder to the back end of ``dst``; return the path of the copy."""
    return _backend(dst, backend_args).copytree_from_local(src, dst)


def copyfile_to_local(src: Address, dst: Address, backend_args: Arguments = None) -> Any:
    """Copy a file from the back end of ``src`` to a local path; return it."""
    return _backend(src, backend_args).copyfile_to_local(src, dst)


def copytree_to_local(src: Address, dst: Address, backend_args: Arguments = None) -> Any:
    """Copy a folder from the back end of ``src`` to a local path; return it."""
    return _backend(src, backend_args).copytree_to_local(src, dst)


def remove(filepath: Address, backend_args: Arguments = None) -> None:
    """Remove a file."""
    _backend(filepath, backend_args).remove(filepath)


def rmtree(dir_path: Address, backend_args: Arguments = None) -> None:
    """Remove a folder and its content."""
    _backend(dir_path, backend_args).rmtree(dir_path)


def copy_if_symlink_fails(src: Address, dst: Address, backend_args: Arguments = None) -> Any:
    """Create the link ``dst`` to ``src``, or a copy if that fails; return whether it is a link."""
    return _backend(src, backend_args).copy_if_symlink_fails(src, dst)


@contextmanager
def get_local_path(filepath: Address, backend_args: Arguments = None) -> Iterator[Any]:
    """Yield the path of a local file, or of a temporary copy that is removed at the end of the block."""
    with _backend(filepath, backend_args).get_local_path(str(filepath)) as path:
        yield path


def list_dir_or_file(
    dir_path: Address,
    list_dir: bool = True,
    list_file: bool = True,
    suffix: str | tuple[str, ...] | None = None,
    recursive: bool = False,
    backend_args: Arguments = None,
) -> Iterator[str]:
    """Return an iterator over the paths in a folder, relative to it; see ``LocalBackend.list_dir_or_file``."""
    yield from _backend(dir_path, backend_args).list_dir_or_file(dir_path, list_dir, list_file, suffix, recursive)


def generate_presigned_url(
    url: str, client_method: str = "get_object", expires_in: int = 3600, backend_args: Arguments = None
) -> Any:
    """Return an address with which anybody can access a file for some seconds."""
    return _backend(url, backend_args).generate_presigned_url(url, client_method, expires_in)


def load(
    file: Any,
    file_format: str | None = None,
    file_client_args: Arguments = None,
    backend_args: Arguments = None,
    **kwargs: Any,
) -> Any:
    """Read an object from a JSON, YAML or pickle file, or from another format that is registered.

    Args:
        file: an address or an open file.
        file_format: the format; by default the extension of the file.
        file_client_args: the arguments of a ``FileClient``; deprecated.
        backend_args: the name and the arguments of the back end.
        kwargs: arguments of the format's reader.

    Raises:
        TypeError: if the format is unknown, or ``file`` is neither an address nor an open file.
        ValueError: if both kinds of arguments are given.
    """
    handler = _handler(file, file_format)
    if hasattr(file, "read"):
        return handler.load_from_fileobj(file, **kwargs)
    backend = open_backend(_address(file), file_client_args, backend_args)
    content = StringIO(backend.get_text(str(file))) if handler.str_like else BytesIO(backend.get(str(file)))
    return handler.load_from_fileobj(content, **kwargs)


def dump(
    obj: Any,
    file: Any = None,
    file_format: str | None = None,
    file_client_args: Arguments = None,
    backend_args: Arguments = None,
    **kwargs: Any,
) -> Any:
    """Write an object to a JSON, YAML or pickle file; without a file, return it as text or bytes.

    Args:
        obj: the object.
        file: an address or an open file.
        file_format: the format; by default the extension of the file.
        file_client_args: the arguments of a ``FileClient``; deprecated.
        backend_args: the name and the arguments of the back end.
        kwargs: arguments of the format's writer.

    Raises:
        TypeError: if the format is unknown, or ``file`` is neither an address nor an open file.
        ValueError: if neither a file nor a format is given, or both kinds of arguments are.
    """
    if file is None and file_format is None:
        raise ConfigValueError("file_format must be specified since file is None")
    handler = _handler(file, file_format)
    if file is None:
        return handler.dump_to_str(obj, **kwargs)
    if hasattr(file, "write"):
        handler.dump_to_fileobj(obj, file, **kwargs)
        return None
    backend = open_backend(_address(file), file_client_args, backend_args)
    buffer: Any = StringIO() if handler.str_like else BytesIO()
    handler.dump_to_fileobj(obj, buffer, **kwargs)
    (backend.put_text if handler.str_like else backend.put)(buffer.getvalue(), str(file))
    return None


def open_backend(file: Address, file_client_args: Arguments, backend_args: Arguments) -> Any:
    """Return the back end of a file, or the deprecated client if ``file_client_args`` is given.

    Raises:
        ValueError: if both kinds of arguments are given.
    """
    if file_client_args is None:
        return get_file_backend(file, backend_args=backend_args)
    warnings.warn("file_client_args is deprecated. Use backend_args instead.", DeprecationWarning, stacklevel=3)
    if backend_args is not None:
        raise ConfigValueError("file_client_args and backend_args cannot be set at the same time.")
    return FileClient.infer_client(file_client_args, file)


def _handler(file: Any, file_format: str | None) -> BaseFileHandler:
    if file_format is None and isinstance(file, str | Path):
        file_format = str(file).rpartition(".")[2]
    if file_format not in file_handlers:
        raise ConfigTypeError(f"Unsupported format: {file_format!r}. Known: {', '.join(sorted(file_handlers))}.")
    return file_handlers[file_format]


def _address(file: Any) -> Address:
    if not isinstance(file, str | Path):
        raise ConfigTypeError(f"The file must be an address or an open file, got {file!r} ({type(file).__name__}).")
    return file
