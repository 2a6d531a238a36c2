"""Start the same command in several processes on this machine, by torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import typer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stratagem.cli.handover import MESSAGE_KEY, NPROC_VARIABLE
from stratagem.dist import infer_launcher
from stratagem.errors import LaunchError

__all__ = ["launch"]

# How long ranks may take to save a checkpoint after a signal before they are killed.
_GRACE_S = 600
_MONITOR_S = 0.1


def launch(nproc: int, arguments: Sequence[str] | None = None) -> None:
    """Run Python with ``arguments`` as ``nproc`` ranks; return when all have ended well.

    Without arguments it is this process's command line, without ``--nproc``. The ranks meet through a file and on the
    loopback interface: nothing listens beyond this machine.

    Raises:
        LaunchError: if this process is itself one of several.
        typer.Exit: with the exit status of the first rank that failed.
    """
    if infer_launcher() != "none":
        raise LaunchError(
            f"--nproc {nproc}: this process was itself started by a launcher ({infer_launcher()}). Leave --nproc out there, "
            "and let the launcher start the processes."
        )
    if arguments is None:
        arguments = ("-m", "stratagem", *_without_nproc(sys.argv[1:]))
    # The workers make a store of their own, which listens on loopback; the agent's would listen everywhere.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[NPROC_VARIABLE] = str(nproc)
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
            max_restarts=0,
            monitor_interval=_MONITOR_S,
            shutdown_timeout=_GRACE_S,
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            status = failure.exitcode
            ended = f"ended with status {status}" if status > 0 else f"was ended by {failure.signal_name()}"
            handed_over = failure.error_file_data.get(MESSAGE_KEY)
            typer.echo(handed_over or f"stratagem: rank {rank} of {nproc} {ended}.", err=True)
            raise typer.Exit(status if status > 0 else 128 - status) from error
        except SignalException as error:
            raise typer.Exit(128 + int(error.sigval)) from error


def _without_nproc(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
