"""Pass errors and exit statuses from the ranks of ``--nproc`` to the process that started them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from stratagem.utils.launch_variables import NPROC_VARIABLE

__all__ = ["RESTARTS_VARIABLE", "STATUS_KEY", "claim_error_report", "restart_notice"]

# Set for the ranks of `--nproc`: the maximum number of restarts.
RESTARTS_VARIABLE = "STRATAGEM_MAX_RESTARTS"
# The key of the exit status in a rank's error file.
STATUS_KEY = "stratagem_status"
# The file that the first rank with an error creates; the other ranks then print nothing.
_CLAIM = "reported"


def claim_error_report(message: str, status: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this rank should print its error: True for the first rank of ``--nproc`` that calls this.

    Under ``--nproc``, also record ``message`` and the exit ``status`` for the launcher. The launcher then exits with this
    status and prints nothing itself. It may terminate this rank before the rank exits on its own.
    """
    file = environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or NPROC_VARIABLE not in environ:
        return True
    # torchrun's launcher reads the first two keys to find the rank that failed first.
    Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time()), STATUS_KEY: status}))
    try:
        # The launcher creates one folder per attempt, and a subfolder per rank in it.
        (Path(file).parents[1] / _CLAIM).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def restart_notice(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return a message if the launcher will restart the ranks, otherwise None."""
    most, done = (int(environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return f"Restarting all ranks (restart {done + 1} of {most})." if done < most else None
