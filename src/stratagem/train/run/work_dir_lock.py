"""Keep a folder to one training at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stratagem.distributed import ProcessIdentity
from stratagem.errors import WorkDirError
from stratagem.storage import operations, write_fully

__all__ = ["work_dir_lock"]

_NAME = ".training.json"
# How often whoever has the folder gives a sign of life, and how many may be missed, for a busy file system.
_HEARTBEAT_S = 10.0
_MISSED = 3.5
# How long data workers and the like may outlive the process that started them.
_ORPHANS_S = 15.0
_POLL_S = 0.1


@contextmanager
def work_dir_lock(folder: Path, logger: logging.Logger, *, heartbeat_s: float = _HEARTBEAT_S) -> Iterator[None]:
    """Hold a folder for the length of a block.

    A file in it names the process that has it, and is locked by ``flock`` where the file system can. What an ended
    process of this machine left is taken over, with a line in the log. A process on another machine cannot be looked at,
    so it changes the file's time every ``heartbeat_s`` seconds: where that stands still for three and a half times as long,
    the process counts as ended.

    Raises:
        WorkDirError: if another process has the folder, or the file cannot be written.
    """
    file = folder / _NAME
    descriptor = _acquire(file, logger, heartbeat_s)
    over = threading.Event()
    heartbeats = threading.Thread(
        target=_send_heartbeats, args=(descriptor, over, heartbeat_s), name="stratagem-lock", daemon=True
    )
    heartbeats.start()
    try:
        yield
    finally:
        over.set()
        heartbeats.join()
        _release(descriptor, file, logger)


def _release(descriptor: int, file: Path, logger: logging.Logger) -> None:
    try:
        if _is_at(descriptor, file):
            # While it is still locked: whoever opens it now sees that it is gone, and makes a new one.
            operations.remove_file(file)
    except OSError as error:
        # It must not hide what the block failed with, and when this process has ended it holds nobody up.
        logger.warning("%s could not be removed: %s", file, error)
    finally:
        operations.close(descriptor)


def _acquire(file: Path, logger: logging.Logger, heartbeat_s: float) -> int:
    """Return a descriptor of the file, locked, with this process's name in it."""
    end = time.monotonic() + _ORPHANS_S
    while True:
        descriptor = _open(file)
        try:
            owner = _read(file)
            if owner is not None and _is_alive(owner, file, logger, heartbeat_s):
                raise _in_use(file, owner)
            if _try_lock(descriptor) and _is_at(descriptor, file) and _read(file) == owner:
                _write(descriptor)
                if owner is not None:
                    logger.warning("%s: took over the folder from %s, which has ended.", file.parent, _describe(owner))
                return descriptor
        except BaseException:
            operations.close(descriptor)
            raise
        operations.close(descriptor)
        if time.monotonic() > end:
            raise WorkDirError(
                f"{file.parent}: a process that another training has started still holds {file.name}. End it (`fuser "
                f"{file}` names it), or choose another --work-dir."
            )
        time.sleep(_POLL_S)


def _open(file: Path) -> int:
    while True:
        try:
            return operations.create_file(file)
        except FileExistsError:
            with suppress(FileNotFoundError):  # it was removed in between: once more
                return operations.open_file(file)


def _try_lock(descriptor: int) -> bool:
    """Lock the file; True as well where the file system knows no locks, then the name in it must do."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Tell whether the file that was opened is still what stands under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False


def _write(descriptor: int) -> None:
    here = ProcessIdentity.here()
    content = {
        "pid": here.pid,
        "place": here.pid_namespace,
        "started": here.start_time,
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    data = json.dumps(content).encode()
    write_fully(descriptor, data, 0)
    operations.truncate(descriptor, len(data))


def _read(file: Path) -> dict[str, Any] | None:
    """Return what the file says of who has the folder; None where it says nothing, as when it was made just now."""
    try:
        said = json.loads(file.read_bytes())
        return said if isinstance(said, dict) and _process(said) else None
    except (OSError, ValueError, KeyError):
        return None


def _process(owner: Mapping[str, Any]) -> ProcessIdentity:
    return ProcessIdentity(owner["pid"], owner["place"], owner["started"])


def _is_alive(owner: Mapping[str, Any], file: Path, logger: logging.Logger, heartbeat_s: float) -> bool:
    process = _process(owner)
    if process.pid_namespace == ProcessIdentity.here().pid_namespace:
        return not process.has_ended()
    seconds = _MISSED * heartbeat_s
    logger.info("%s: %s has the folder; waiting %g s for a sign of its life.", file.parent, _describe(owner), seconds)
    seen, end = _time_of(file), time.monotonic() + seconds
    while time.monotonic() < end:
        if _time_of(file) != seen:
            return True
        time.sleep(min(_POLL_S, heartbeat_s))
    return False


def _time_of(file: Path) -> int:
    """Return when the file was changed, as its server knows: network file systems ask it anew when a file is opened."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _send_heartbeats(descriptor: int, over: threading.Event, heartbeat_s: float) -> None:
    while not over.wait(heartbeat_s):
        with suppress(OSError):  # one missed beat is no harm, and there may be a next
            os.utime(descriptor)


def _in_use(file: Path, owner: Mapping[str, Any]) -> WorkDirError:
    here = _process(owner) == ProcessIdentity.here()
    who = "this process itself" if here else _describe(owner)
    return WorkDirError(
        f"{file.parent}: another training has this folder: {who}. Wait for its end or end it, or choose another "
        f"--work-dir. If there is no such process, remove {file}."
    )


def _describe(owner: Mapping[str, Any]) -> str:
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}"
