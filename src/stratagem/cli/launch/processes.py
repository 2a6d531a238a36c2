"""Start the same command in several processes: on this machine by torchrun's own launcher, or by Ray."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import typer
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stratagem.cli.launch.child_status import NPROC_VARIABLE, RESTARTS_VARIABLE, STATUS_KEY
from stratagem.cli.launch.on_ray import launch_on_ray
from stratagem.distributed import infer_launcher
from stratagem.errors import LaunchError

__all__ = ["launch_again", "launch_here"]

# How long ranks may take to save a checkpoint after a signal before they are killed.
_GRACE_S = 600
_MONITOR_S = 0.1
_STARTING = ("--nproc", "--launcher", "--max-restarts")
_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


def launch_again(nproc: int, *, by: str | None, max_restarts: int = 0) -> None:
    """Run this process's command line as ``nproc`` ranks; return when all have ended well.

    ``by`` is ``"ray"`` for the hosts of a Ray cluster; else the ranks run on this machine, and are started again when one
    fails, up to ``max_restarts`` times.

    Raises:
        LaunchError: if this process is itself one of several, or the ranks cannot be started.
        typer.Exit: with the exit status of the first rank that failed.
    """
    launcher = infer_launcher()
    if launcher != "none":
        raise LaunchError(
            f"--nproc {nproc}: this process was itself started by a launcher ({launcher}). Leave --nproc out there, "
            "and let the launcher start the processes."
        )
    arguments = ("-m", "stratagem", *_of_ranks(sys.argv[1:]))
    if by == "ray":
        launch_on_ray(nproc, arguments)
    else:
        launch_here(nproc, arguments, max_restarts=max_restarts)


def launch_here(nproc: int, arguments: Sequence[str], *, max_restarts: int = 0) -> None:
    """Run Python with ``arguments`` as ``nproc`` ranks on this machine; return when all have ended well.

    When a rank fails, all are started again, up to ``max_restarts`` times. Signals are passed on to the ranks, and SIGINT,
    SIGTERM and SIGUSR1 give them time to save. The ranks meet through a file and on the loopback interface: nothing
    listens beyond this machine.

    Raises:
        typer.Exit: with the exit status of the first rank that failed.
    """
    # The workers make a store of their own, which listens on loopback; the agent's would listen everywhere.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[NPROC_VARIABLE] = str(nproc)
    if max_restarts:
        os.environ[RESTARTS_VARIABLE] = str(max_restarts)
    # When rank 0 dies the others lose its store; torch would print its own stacks of that above our message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # It would report on our ranks' errors and signals a second time.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Each rank computes with its share of the cores, unless the user has chosen.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with tempfile.TemporaryDirectory(prefix="stratagem-") as folder:
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
            signals_to_handle=",".join(_PASSED_ON),
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            told = failure.error_file_data.get(STATUS_KEY)
            if told is not None:
                raise typer.Exit(told) from error
            status = failure.exitcode
            ended = f"ended with status {status}" if status > 0 else f"was ended by {failure.signal_name()}"
            typer.echo(f"stratagem: rank {rank} of {nproc} {ended}.", err=True)
            raise typer.Exit(status if status > 0 else 128 - status) from error
        except SignalException as error:
            raise typer.Exit(128 + int(error.sigval)) from error


def _of_ranks(arguments: list[str]) -> list[str]:
    """Return the command line of a rank: without what says how the ranks are started."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in _STARTING:
            skip = True
        elif argument.partition("=")[0] not in _STARTING:
            kept.append(argument)
    return kept
