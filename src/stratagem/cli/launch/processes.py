"""Run the current command as several ranks: on this machine with torchrun's launcher, or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

import typer
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stratagem.cli.launch.child_status import RESTARTS_VARIABLE, STATUS_KEY
from stratagem.cli.launch.on_ray import launch_on_ray
from stratagem.cli.launch.stopped_ranks import continue_stopped_ranks
from stratagem.cli.output import echo
from stratagem.distributed import infer_launcher
from stratagem.errors import LaunchError
from stratagem.utils.launch_variables import NPROC_VARIABLE

__all__ = ["RankExitError", "launch_locally", "launch_ranks", "run_ranks"]

# The time that ranks have to save a checkpoint after a signal before they are killed.
_GRACE_S = 600
_MONITOR_S = 0.1
_LAUNCH_OPTIONS = ("--nproc", "--launcher", "--max-restarts")
_FORWARDED_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


def launch_ranks(nproc: int, *, by: str | None, max_restarts: int = 0) -> None:
    """Run the command line of this process as ``nproc`` ranks, and wait until all have succeeded.

    Args:
        nproc: the number of ranks.
        by: ``"ray"`` to run on a Ray cluster; otherwise the ranks run on this machine.
        max_restarts: the maximum number of times that all ranks are restarted if one fails; unused on Ray.

    Raises:
        LaunchError: if this process is itself a rank of a launcher, or the ranks cannot be started.
        typer.Exit: with the exit status of the first rank that failed.
    """
    launcher = infer_launcher()
    if launcher != "none":
        raise LaunchError(
            f"--nproc {nproc}: this process was already started by a launcher ({launcher}). Omit --nproc, and let the "
            "launcher start the processes."
        )
    arguments = ("-m", "stratagem", *_without_launch_options(sys.argv[1:]))
    if by == "ray":
        launch_on_ray(nproc, arguments)
    else:
        launch_locally(nproc, arguments, max_restarts=max_restarts)


@final
class RankExitError(Exception):
    """A rank has failed. The message contains the rank, and its exit status or the signal that killed it.

    Attributes:
        status: the exit status for the launcher.
        has_reported: whether the rank has described its error in its error file.
    """

    def __init__(self, message: str, status: int, *, has_reported: bool) -> None:
        super().__init__(message)
        self.status = status
        self.has_reported = has_reported


def launch_locally(nproc: int, arguments: Sequence[str], *, max_restarts: int = 0) -> None:
    """Run Python with ``arguments`` as ``nproc`` ranks on this machine, as :func:`run_ranks` does, for a command.

    Raises:
        typer.Exit: with the exit status of the first rank that failed.
    """
    try:
        run_ranks(nproc, arguments, max_restarts=max_restarts)
    except RankExitError as error:
        if not error.has_reported:
            echo(f"stratagem: {error}.", err=True)
        raise typer.Exit(error.status) from error
    except SignalException as error:
        raise typer.Exit(128 + int(error.sigval)) from error


def run_ranks(nproc: int, arguments: Sequence[str], *, max_restarts: int = 0) -> None:
    """Run Python with ``arguments`` as ``nproc`` ranks on this machine, and wait until all have succeeded.

    If a rank fails, all are restarted, at most ``max_restarts`` times. Signals are forwarded to the ranks, which have
    time to save a checkpoint; ranks that are stopped (SIGSTOP) are continued for this. The rendezvous uses a file and
    the loopback interface, so no port is open to other hosts. Call it in the main thread.

    Raises:
        RankExitError: if a rank failed; it describes the first one.
        SignalException: if this process received a signal and the ranks have exited.
    """
    # Windows has fewer signals.
    numbers = [getattr(signal, name) for name in _FORWARDED_SIGNALS if hasattr(signal, name)]
    with tempfile.TemporaryDirectory(prefix="stratagem-") as folder, _launcher_settings(nproc, max_restarts, numbers):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder) / "store"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=max_restarts,
            monitor_interval=_MONITOR_S,
            shutdown_timeout=_GRACE_S,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(_FORWARDED_SIGNALS),
        )
        try:
            with continue_stopped_ranks(numbers):
                elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            reported = failure.error_file_data.get(STATUS_KEY)
            status = failure.exitcode
            cause = f"exited with status {status}" if status > 0 else f"was killed by {failure.signal_name()}"
            if reported is None:
                reported = status if status > 0 else 128 - status
                raise RankExitError(f"rank {rank} of {nproc} {cause}", reported, has_reported=False) from error
            raise RankExitError(f"rank {rank} of {nproc} {cause}", reported, has_reported=True) from error


@contextmanager
def _launcher_settings(nproc: int, max_restarts: int, signals: Sequence[int]) -> Iterator[None]:
    """Set what torch's launcher and the ranks read from this process, and restore it: it may be a notebook."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in signals}
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    # Let the ranks create their own store on the loopback interface. The store of torchrun's launcher would listen on
    # all interfaces.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[NPROC_VARIABLE] = str(nproc)
    if max_restarts:
        os.environ[RESTARTS_VARIABLE] = str(max_restarts)
    # If rank 0 dies, the others lose its store, and torch would print C++ stack traces above the error message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Divide the cores among the ranks unless the user has set the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # torch would report the errors and signals of the ranks a second time.
    elastic.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        elastic.setLevel(level)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        for number, handler in handlers.items():
            # None is a handler that was not installed from Python, which cannot be restored.
            if handler is not None:
                signal.signal(number, handler)


def _without_launch_options(arguments: list[str]) -> list[str]:
    """Return the arguments for a rank: this process's arguments without the options that start ranks."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in _LAUNCH_OPTIONS:
            skip = True
        elif argument.partition("=")[0] not in _LAUNCH_OPTIONS:
            kept.append(argument)
    return kept
