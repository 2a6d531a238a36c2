"""How a rank that was started by ``--nproc`` gives its error to the process that started it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

__all__ = ["MESSAGE_KEY", "NPROC_VARIABLE", "hand_over"]

# Tells ranks that `--nproc` started them, and how many there are.
NPROC_VARIABLE = "STRATAGEM_NPROC"
MESSAGE_KEY = "stratagem"


def hand_over(message: str) -> bool:
    """Give the error that ends this rank to the process that started it with ``--nproc``, which tells it once.

    Returns False where no such process waits for it, so that the rank has to tell it itself.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or NPROC_VARIABLE not in os.environ:
        return False
    # The first two keys are what the launcher reads to find the rank that failed first.
    Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time()), MESSAGE_KEY: message}))
    return True
