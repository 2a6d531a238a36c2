"""One rank of ``launch``: call the function, and leave its result or its exception to the process that started the ranks."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing import spawn
from pathlib import Path

from stratagem.cli.launch.child_status import claim_error_report
from stratagem.cli.launch.functions import CALL, PREPARATION, dump, error_file, exception_file, result_file
from stratagem.distributed import close_dist
from stratagem.errors import RankFailedError

__all__ = ["main"]


def main(folder: Path) -> None:
    """Call the function of a launch as one of its ranks.

    Args:
        folder: the folder that the ranks share with the process that started them.
    """
    rank = int(os.environ["RANK"])
    # After a restart, the folder contains the files of the previous attempt.
    for file in (result_file(folder, rank), error_file(folder, rank), exception_file(folder, rank)):
        file.unlink(missing_ok=True)
    try:
        preparation = pickle.loads((folder / PREPARATION).read_bytes())  # noqa: S301 -- written by the caller of launch
        spawn.prepare(preparation)
        function, args, kwargs = pickle.loads((folder / CALL).read_bytes())  # noqa: S301 -- see above
        result, _ = dump(function(*args, **kwargs), allow_main=any(key.startswith("init_main") for key in preparation))
        _write(result_file(folder, rank), result)
        # Threads of a process group that is still open may abort the process at its end.
        close_dist()
    except Exception as error:  # noqa: BLE001 -- the outermost level of the process, where every error is reported
        _report(folder, rank, error)
        # Do not close the process group, because the other ranks may be waiting in a collective.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _report(folder: Path, rank: int, error: Exception) -> None:
    # Without the frame of this module.
    shown = error.__traceback__.tb_next if error.__traceback__ is not None else None
    notes = getattr(error, "__notes__", [])
    message = "\n".join([str(error), *notes])
    description = {
        "time": time.time(),
        "type": type(error).__name__,
        "message": message,
        "traceback": "".join(traceback.format_exception(type(error), error, shown)),
        "reports_another_rank": isinstance(error, RankFailedError),
    }
    # An exception that cannot be pickled is described only.
    with suppress(Exception):
        _write(exception_file(folder, rank), dump(error, allow_main=False)[0])
    _write(error_file(folder, rank), json.dumps(description).encode())
    claim_error_report(message, 1)


def _write(file: Path, content: bytes) -> None:
    """Write a file completely or not at all, because this process may be killed."""
    temporary = file.with_suffix(".part")
    temporary.write_bytes(content)
    temporary.replace(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
