"""Report batches and indices that cannot be sent between the training process and its data workers.

A queue of :mod:`multiprocessing` pickles and sends its items in a thread. If that fails, the thread only prints the error, and
both processes wait for each other forever.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any, Final, NoReturn, final

from stratagem.errors import TrainingError
from stratagem.utils.torch_private import ExceptionWrapper

__all__ = ["report_unsent_batches", "report_unsent_indices"]

# The method that a queue calls in its thread, with the error and the item. It has this name in all versions of Python, because
# concurrent.futures overrides it.
_HANDLER: Final = "_on_queue_feeder_error"
_print_error: Callable[[Exception, object], None] = getattr(Queue, _HANDLER)


def report_unsent_batches() -> None:
    """In a data worker, send an error to the training process in place of each batch that cannot be sent."""
    setattr(Queue, _HANDLER, _send_error)


@contextmanager
def report_unsent_indices() -> Iterator[None]:
    """Inside the ``with`` block, in which workers are started: let a worker fail if its indices cannot be sent to it."""
    before = vars(Queue)[_HANDLER]
    setattr(Queue, _HANDLER, _send_failure)
    try:
        yield
    finally:
        setattr(Queue, _HANDLER, before)


def _send_error(queue: Queue[Any], error: Exception, item: object) -> None:
    number = _batch_number(item)
    if number is None:  # a queue of the dataset
        _print_error(error, item)
        return
    raised = TrainingError(
        f"A data worker cannot send batch {number} of the epoch to the training process: {type(error).__name__}: {error}. "
        f"{_remedy(error)}"
    )
    queue.put((number, ExceptionWrapper((TrainingError, raised, None), where="in a data worker")))


def _send_failure(queue: Queue[Any], error: Exception, item: object) -> None:
    number = _batch_number(item)
    if number is None:
        _print_error(error, item)
        return
    message = (
        f"The indices of batch {number} of the epoch cannot be sent to a data worker: {type(error).__name__}: {error}. Use a "
        "sampler whose values pickle supports, or set num_workers=0."
    )
    queue.put(_Failure(message))


def _batch_number(item: object) -> int | None:
    """Return the number of a batch, given an item of a queue of torch's data loader; None for other items."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int):
        return item[0]
    return None


def _remedy(error: Exception) -> str:
    if isinstance(error, OSError) and "AF_UNIX" in str(error):
        folder = tempfile.gettempdir()
        return (
            f"Tensors are sent through sockets in the directory for temporary files, {folder}, whose path of {len(folder)} "
            "characters is too long for a socket. Set TMPDIR to a short path such as /tmp."
        )
    if isinstance(error, OSError):
        return "To load samples in the training process, set num_workers=0."
    return (
        "Return values that pickle supports, such as tensors and numbers, from the dataset and from collate_fn, or set "
        "num_workers=0."
    )


@final
class _Failure:
    """An item whose receiver raises an error."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __reduce__(self) -> tuple[Callable[[str], NoReturn], tuple[str]]:
        return _fail, (self._message,)


def _fail(message: str) -> NoReturn:
    raise TrainingError(message)
