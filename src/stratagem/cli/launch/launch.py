"""Run a Python function as several ranks on this machine, from a script or a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratagem.utils import import_object

__all__ = ["launch"]


def launch(function: Callable[..., Any], *args: Any, nproc: int, max_restarts: int = 0, **kwargs: Any) -> list[Any]:
    """Call ``function(*args, **kwargs)`` in ``nproc`` new processes of this machine; return the results in order of rank.

    The processes are ranks of one launch, as with ``stratagem train --nproc``: a :class:`~stratagem.Runner`, a strategy or
    ``stratagem.dist.init_dist("pytorch")`` in the function connects them over the loopback interface. Call it from the main
    thread of a script, or in a notebook. A script needs the guard ``if __name__ == "__main__":``, because the ranks import
    it. A function that is defined in a notebook, a lambda or a nested function needs the package cloudpickle.

    The processes are new ones, not forks, so this process may have used CUDA before. The function, its arguments and
    the results are pickled. If a rank fails, the others are shut down. Ctrl-C, or interrupting the kernel, and other signals are
    forwarded to the ranks, in which a run saves a checkpoint and stops.

    Args:
        function: the function to call.
        args: its positional arguments, the same for every rank.
        nproc: the number of processes.
        max_restarts: how often all ranks are restarted if one fails.
        kwargs: its keyword arguments.

    Raises:
        LaunchedRankError: if the function raises an exception on a rank, or a rank is killed. The message contains the rank and
            its traceback. ``__cause__`` is the exception, if it can be pickled.
        LaunchError: if this process is itself a rank, or this is not the main thread.
        MissingDependencyError: if the function or an argument requires cloudpickle, which is not installed.
        KeyboardInterrupt: after SIGINT.
        SystemExit: after another signal.
    """
    # The implementation needs libraries of the command line, and modules that exist only on POSIX systems.
    results: list[Any] = import_object("stratagem.cli.launch.functions:call_in_ranks")(
        function, args, kwargs, nproc=nproc, max_restarts=max_restarts
    )
    return results
