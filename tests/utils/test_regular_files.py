"""Only regular files are opened for writing; anything else raises an error immediately."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from stratagem.logging import JsonLinesWriter, Logger
from stratagem.storage import read_bytes, write_bytes
from stratagem.utils.regular_files import open_regular


def make_link(path: Path) -> None:
    """Make a link to a file that must not change."""
    victim = path.parent / "victim"
    victim.write_text("valuable")
    path.symlink_to(victim)


def make_dangling_link(path: Path) -> None:
    """Make a link to a file that must not be created."""
    path.symlink_to(path.parent / "created")


def make_pipe(path: Path) -> None:
    """Make a named pipe, for which opening would wait for a reader."""
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """Make a socket."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


OTHER_KINDS = {
    "a symbolic link": make_link,
    "a symbolic link ": make_dangling_link,
    "a named pipe": make_pipe,
    "a directory": Path.mkdir,
    "a socket": make_socket,
}
each_kind = pytest.mark.parametrize(
    ("kind", "make"), OTHER_KINDS.items(), ids=lambda value: getattr(value, "__name__", "")
)


@each_kind
@pytest.mark.parametrize(
    "write",
    [
        lambda path: os.close(open_regular(path, os.O_WRONLY | os.O_CREAT)),
        lambda path: write_bytes(path, b"x"),
        lambda path: Logger("x", log_file=path, console=False),
        JsonLinesWriter,
    ],
    ids=["open_regular", "write_bytes", "Logger", "JsonLinesWriter"],
)
def test_other_kinds_of_files_are_rejected(
    tmp_path: Path, kind: str, make: Callable[[Path], None], write: Callable[[Path], object]
) -> None:
    """A link, a pipe, a directory or a socket is neither written to nor waited for, and the error names its kind."""
    make(tmp_path / "file")
    with pytest.raises(OSError, match=f"it is {kind.strip()}, and a regular file is required"):
        write(tmp_path / "file")
    assert not (tmp_path / "created").exists()
    if (tmp_path / "victim").exists():
        assert (tmp_path / "victim").read_text() == "valuable"


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    """Reading a named pipe is an error instead of waiting for a writer; a link to a file is read."""
    make_pipe(tmp_path / "pipe")
    with pytest.raises(OSError, match="a named pipe"):
        read_bytes(tmp_path / "pipe")
    make_link(tmp_path / "link")
    assert read_bytes(tmp_path / "link") == b"valuable"


def test_a_device_is_rejected() -> None:
    """A character device is not a regular file."""
    with pytest.raises(OSError, match="a device"):
        open_regular("/dev/null", os.O_WRONLY)
