"""Lock work directories so that only one run uses each of them."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, final

from stratagem.distributed import ProcessIdentity, RankGroup
from stratagem.errors import WorkDirError
from stratagem.storage import clean_temporaries, closing_descriptor, is_same_file, operations, read_at, write_fully

try:
    import fcntl
except ImportError:  # Windows
    _HAS_FCNTL = False
else:
    _HAS_FCNTL = True

__all__ = ["WorkDirLocks", "work_dir_lock"]

_NAME = ".training.json"
_HEARTBEAT_S = 10.0
# A lock expires after this many heartbeat intervals; more than one, because a busy file system can delay heartbeats.
_EXPIRY_INTERVALS = 3.5
# How long to wait for data workers and other child processes that outlive the process that held the lock.
_ORPHANS_S = 15.0
_POLL_S = 0.1
# The maximum number of bytes to read from a lock file; the record of an owner is far smaller.
_MOST_BYTES = 65536


@final
class WorkDirLocks:
    """The work directories that a run has locked. Rank 0 locks them and removes files left behind by killed runs."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._held: set[Path] = set()
        self._locks = ExitStack()

    @contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Lock a directory; on exit, release it and all directories locked in the meantime. Collective on entry."""
        with ExitStack() as locks:
            self._locks, self._held = locks, set()
            self.acquire(folder)
            yield

    def acquire(self, folder: Path) -> None:
        """Lock another directory, creating it if it does not exist; do nothing if it is already held. Collective.

        Raises:
            WorkDirError: on every rank, if another run holds the lock.
        """
        if folder not in self._held:
            RankGroup.of().run_on_rank0(lambda: self._lock(folder))
            self._held.add(folder)

    def _lock(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._locks.enter_context(work_dir_lock(folder, self._logger))
        cleaned = clean_temporaries(folder)
        for path in cleaned.removed:
            self._logger.info("Removed %s, a leftover of a killed run.", path)
        for path in cleaned.restored:
            self._logger.warning("Restored %s: a run was killed while replacing it.", path)


@contextmanager
def work_dir_lock(folder: Path, logger: logging.Logger, *, heartbeat_s: float = _HEARTBEAT_S) -> Iterator[None]:
    """Hold the lock of a directory for the duration of the context.

    The lock is a file that names its owner; it is also locked with ``flock`` if the system supports that. If the owner was
    a process on this machine that has exited, the lock is taken over and a warning is logged. The owner updates the
    modification time of the file every ``heartbeat_s`` seconds, because processes on other machines cannot be inspected: an
    owner on another machine is considered dead if the modification time does not change for 3.5 intervals. Without
    ``flock``, two runs that start at the same moment may both acquire the lock.

    Raises:
        WorkDirError: if another process holds the lock, or the file cannot be written.
    """
    file = folder / _NAME
    descriptor = _acquire(file, logger, heartbeat_s)
    stop = threading.Event()
    heartbeats = threading.Thread(
        target=_send_heartbeats,
        args=(descriptor if os.utime in os.supports_fd else file, stop, heartbeat_s),
        name="stratagem-lock",
        daemon=True,
    )
    heartbeats.start()
    try:
        yield
    finally:
        stop.set()
        heartbeats.join()
        _release(descriptor, file, logger)


def _release(descriptor: int, file: Path, logger: logging.Logger) -> None:
    with ExitStack() as closing:
        closing.callback(operations.close, descriptor)
        try:
            if is_same_file(descriptor, file):
                if not _HAS_FCNTL:  # Windows cannot remove an open file
                    closing.close()
                # Remove the file while it is locked: a process that has opened it detects that the file is gone and creates
                # a new one.
                operations.remove_file(file)
        except OSError as error:
            # Do not hide an error of the block. The leftover file is harmless once this process has exited.
            logger.warning("Could not remove %s: %s", file, error)


def _acquire(file: Path, logger: logging.Logger, heartbeat_s: float) -> int:
    """Return the descriptor of the lock file, which is locked and names this process."""
    deadline = time.monotonic() + _ORPHANS_S
    while True:
        descriptor = _open(file)
        try:
            owner = _read_owner(descriptor)
            if owner is not None and _is_alive(owner, file, logger, heartbeat_s):
                raise _in_use(file, owner)
            if _try_lock(descriptor) and is_same_file(descriptor, file) and _read_owner(descriptor) == owner:
                _write_owner(descriptor, file)
                if owner is not None:
                    logger.warning("%s: took over the lock of %s, which has exited.", file.parent, _describe(owner))
                return descriptor
        except BaseException:
            operations.close(descriptor)
            raise
        operations.close(descriptor)
        if time.monotonic() > deadline:
            raise WorkDirError(
                f"{file.parent}: a child process of an earlier run still holds {file.name}. Terminate it (`fuser "
                f"{file}` prints its PID), or choose another --work-dir."
            )
        time.sleep(_POLL_S)


def _open(file: Path) -> int:
    while True:
        try:
            return operations.create_file(file)
        except FileExistsError:
            try:
                return operations.open_file(file)
            except FileNotFoundError:  # removed in between: try again
                continue
            except OSError as error:
                raise _cannot_open(file, error) from error
        except OSError as error:
            raise _cannot_open(file, error) from error


def _cannot_open(file: Path, error: OSError) -> WorkDirError:
    return WorkDirError(f"{file}: the lock of the work directory cannot be opened: {error.strerror}.")


def _try_lock(descriptor: int) -> bool:
    """Lock the file with ``flock``; also return True if the platform or the file system does not support locks."""
    if not _HAS_FCNTL:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _write_owner(descriptor: int, file: Path) -> None:
    here = ProcessIdentity.here()
    content = {
        "pid": here.pid,
        "place": here.pid_namespace,
        "started": here.start_time,
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    data = json.dumps(content).encode()
    try:
        write_fully(descriptor, data, 0)
        operations.truncate(descriptor, len(data))
    except OSError as error:
        raise WorkDirError(f"{file}: the lock of the work directory cannot be written: {error.strerror}.") from error


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """Return the owner as recorded in the file, or None if its contents are invalid, for example because it is new."""
    try:
        data = bytearray(_MOST_BYTES)
        owner = json.loads(data[: read_at(descriptor, memoryview(data), 0)])
        return owner if isinstance(owner, dict) and _process(owner) else None
    except (OSError, ValueError, KeyError):
        return None


def _process(owner: Mapping[str, Any]) -> ProcessIdentity:
    return ProcessIdentity(owner["pid"], owner["place"], owner["started"])


def _is_alive(owner: Mapping[str, Any], file: Path, logger: logging.Logger, heartbeat_s: float) -> bool:
    process = _process(owner)
    if process.pid_namespace == ProcessIdentity.here().pid_namespace:
        return not process.has_ended()
    seconds = _EXPIRY_INTERVALS * heartbeat_s
    logger.info("%s is locked by %s; waiting %g s for a heartbeat.", file.parent, _describe(owner), seconds)
    first, deadline = _modified_at(file), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _modified_at(file) != first:
            return True
        time.sleep(min(_POLL_S, heartbeat_s))
    return False


def _modified_at(file: Path) -> int:
    """Return the modification time. Network file systems only query the server for it when the file is opened."""
    try:
        with closing_descriptor(operations.open_file(file)) as descriptor:
            return os.fstat(descriptor).st_mtime_ns
    except FileNotFoundError:
        return 0


def _send_heartbeats(file: int | Path, stop: threading.Event, heartbeat_s: float) -> None:
    while not stop.wait(heartbeat_s):
        with suppress(OSError):  # one missed heartbeat is harmless
            os.utime(file)


def _in_use(file: Path, owner: Mapping[str, Any]) -> WorkDirError:
    is_own = _process(owner) == ProcessIdentity.here()
    who = "this process" if is_own else _describe(owner)
    return WorkDirError(
        f"{file.parent} is locked by another training run: {who}. Wait until it finishes, terminate it, or choose another "
        f"--work-dir. If no such process exists, remove {file}."
    )


def _describe(owner: Mapping[str, Any]) -> str:
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}"
