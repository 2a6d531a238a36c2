"""What the ranks of ``--nproc`` and the process that started them know of each other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["NPROC_VARIABLE", "RESTARTS_VARIABLE", "STATUS_KEY", "claim_telling", "restart_notice"]

# Tell ranks that `--nproc` started them, how many there are, and how often they may be started again.
NPROC_VARIABLE = "STRATAGEM_NPROC"
RESTARTS_VARIABLE = "STRATAGEM_MAX_RESTARTS"
# The status that belongs to an error which a rank has told.
STATUS_KEY = "stratagem_status"
_CLAIM = "told"


def claim_telling(message: str, status: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this rank is the one to tell the error that ends it: a mistake of all ranks is told by the first.

    Where ``--nproc`` started the rank, the process that did so comes to know that it need not tell anything itself, and
    the exit ``status`` that the error has: it may end this rank before that has ended by itself.
    """
    file = environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or NPROC_VARIABLE not in environ:
        return True
    # The first two keys are what the launcher reads to find the rank that failed first.
    Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time()), STATUS_KEY: status}))
    try:
        # The launcher has a folder for each start, and in it one for each rank.
        (Path(file).parents[1] / _CLAIM).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def restart_notice(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the sentence that says that the launcher starts the ranks again; None where it does not."""
    most, done = (int(environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return f"The ranks are started again (restart {done + 1} of {most})." if done < most else None
