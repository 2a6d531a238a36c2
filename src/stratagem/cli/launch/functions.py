"""Run a Python function as several ranks on this machine, from a script or a notebook."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import spawn
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.multiprocessing.api import SignalException

from stratagem.cli.launch.processes import RankExitError, run_ranks
from stratagem.distributed import infer_launcher
from stratagem.errors import ConfigTypeError, LaunchedRankError, LaunchError, MissingDependencyError
from stratagem.utils import import_module
from stratagem.utils.printable import escape_controls

__all__ = ["CALL", "PREPARATION", "call_in_ranks", "dump", "error_file", "exception_file", "result_file"]

# The files in the folder of a launch: how to import the caller's modules, and the function with its arguments.
PREPARATION: Final = "preparation"
CALL: Final = "call"
_MODULE: Final = "stratagem.cli.launch.function_rank"
# Entries in the preparation of a process of `multiprocessing` that a rank does not need.
_UNUSED: Final = ("authkey", "start_method", "log_to_stderr", "log_level", "name")
_MAIN: Final = "__main__"


def call_in_ranks(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, nproc: int, max_restarts: int
) -> list[Any]:
    """Implement :func:`stratagem.launch`."""
    _check(function, nproc, max_restarts)
    with tempfile.TemporaryDirectory(prefix="stratagem-") as name:
        folder = Path(name)
        call, by_value = dump((function, tuple(args), dict(kwargs)), allow_main=_main_can_be_imported())
        (folder / CALL).write_bytes(call)
        (folder / PREPARATION).write_bytes(pickle.dumps(_preparation(with_main=not by_value and _refers_to_main(call))))
        try:
            run_ranks(nproc, ("-m", _MODULE, str(folder)), max_restarts=max_restarts)
        except RankExitError as error:
            raise _failure(folder, nproc, error) from _exception(folder, nproc)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + int(error.sigval)) from None
        return [_result(folder, rank, nproc) for rank in range(nproc)]


def _check(function: Any, nproc: Any, max_restarts: Any) -> None:
    if not callable(function):
        raise ConfigTypeError(
            f"launch: expected a function, got {function!r}. Pass the function itself: launch(train, nproc=2)."
        )
    for name, value, least in (("nproc", nproc, 1), ("max_restarts", max_restarts, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigTypeError(f"launch: {name} must be an integer >= {least}, got {value!r}.")
    launcher = infer_launcher()
    if launcher != "none":
        raise LaunchError(
            f"launch was called in a process that a launcher ({launcher}) has started as rank {os.environ.get('RANK', '?')}, and "
            "launches cannot be nested. If the call is at the top level of a script, put it under `if __name__ == "
            "'__main__':`, because the ranks import the script; otherwise, call the function itself."
        )
    if threading.current_thread() is not threading.main_thread():
        raise LaunchError(
            f"launch was called in the thread {threading.current_thread().name!r}, but only the main thread can forward "
            "signals to the ranks. Call it in the main thread."
        )


def dump(value: Any, *, allow_main: bool) -> tuple[bytes, bool]:
    """Pickle a value; return the bytes, and whether its functions and classes are pickled by value.

    Args:
        value: the value.
        allow_main: whether the reader can import the module ``__main__`` of this process.

    Raises:
        MissingDependencyError: if that requires cloudpickle, which is not installed.
        LaunchError: if the value cannot be pickled.
    """
    try:
        plain = pickle.dumps(value)
    except Exception as error:  # noqa: BLE001 -- pickling runs code of users, which may raise anything
        reason: Exception | None = error
    else:
        if allow_main or not _refers_to_main(plain):
            return plain, False
        reason = None
    try:
        cloudpickle = import_module("cloudpickle", extra="notebook")
    except MissingDependencyError as error:
        why = (
            f"it cannot be pickled ({reason})"
            if reason is not None
            else "it is defined in a notebook or an interactive session"
        )
        raise MissingDependencyError(
            f"launch: {_describe(value)} requires the package cloudpickle, because {why}. Install it: pip install "
            "stratagem[notebook]. Or define the function at the top level of a module, such as train.py, and import it."
        ) from error
    buffer = io.BytesIO()
    try:
        cloudpickle.CloudPickler(buffer).dump(value)
    except Exception as error:
        raise LaunchError(f"launch: {_describe(value)} cannot be sent to another process: {error}.") from error
    return buffer.getvalue(), True


def _describe(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 3 and callable(value[0]):
        return f"the call of {getattr(value[0], '__qualname__', repr(value[0]))}"
    return f"the result, of type {type(value).__name__},"


def _refers_to_main(pickled: bytes) -> bool:
    return _MAIN.encode() in pickled


def _main_can_be_imported() -> bool:
    """Return whether another process can import the main module of this one, as for a script but not for a notebook."""
    found = spawn.get_preparation_data("rank")
    path = found.get("init_main_from_path")
    return "init_main_from_name" in found or (path is not None and Path(path).is_file())


def _preparation(*, with_main: bool) -> dict[str, Any]:
    """Return how a rank finds the modules of this process, for ``multiprocessing.spawn.prepare``."""
    found = {key: value for key, value in spawn.get_preparation_data("rank").items() if key not in _UNUSED}
    return {key: value for key, value in found.items() if with_main or not key.startswith("init_main")}


def result_file(folder: Path, rank: int) -> Path:
    """Return the file with the pickled result of a rank."""
    return folder / f"result_{rank}"


def error_file(folder: Path, rank: int) -> Path:
    """Return the file that describes the exception of a rank: its time, type, message and traceback."""
    return folder / f"error_{rank}.json"


def exception_file(folder: Path, rank: int) -> Path:
    """Return the file with the pickled exception of a rank."""
    return folder / f"exception_{rank}"


def _result(folder: Path, rank: int, nproc: int) -> Any:
    try:
        return pickle.loads(result_file(folder, rank).read_bytes())  # noqa: S301 -- written by a rank of this launch
    except FileNotFoundError:
        raise LaunchedRankError(f"Rank {rank} of {nproc} exited before the function returned.") from None


def _errors(folder: Path, nproc: int) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the exceptions of the ranks, the first one first; those that only report another rank come last."""
    found = [
        (rank, json.loads(error_file(folder, rank).read_text()))
        for rank in range(nproc)
        if error_file(folder, rank).exists()
    ]
    return sorted(found, key=lambda each: (each[1]["reports_another_rank"], each[1]["time"]))


def _failure(folder: Path, nproc: int, exited: RankExitError) -> LaunchedRankError:
    errors: Sequence[tuple[int, Mapping[str, Any]]] = _errors(folder, nproc)
    # The others may fail because a rank was killed.
    if not errors or not exited.has_reported:
        others = "".join(f" Rank {rank} raised {each['type']}: {each['message']}" for rank, each in errors[:1])
        return LaunchedRankError(f"{_sentence(str(exited))}{others}")
    rank, first = errors[0]
    others = f" Rank {', '.join(str(other) for other, _ in errors[1:])} failed too." if errors[1:] else ""
    return LaunchedRankError(
        f"Rank {rank} of {nproc} raised {first['type']}: {first['message']}.{others}\n\nThe traceback of rank {rank}:\n"
        f"{escape_controls(first['traceback'])}"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _exception(folder: Path, nproc: int) -> BaseException | None:
    for rank, _ in _errors(folder, nproc)[:1]:
        try:
            found = pickle.loads(exception_file(folder, rank).read_bytes())  # noqa: S301 -- written by a rank of this launch
        except Exception:  # noqa: BLE001 -- unpickling an exception runs its constructor, which may raise anything
            return None
        return found if isinstance(found, BaseException) else None
    return None
