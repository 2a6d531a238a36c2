"""Disks that are full or fail at each operation of a save, once or permanently."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from stratagem.errors import CheckpointError
from tests.support.faults import Act, between, counted, failing, number_of_operations
from tests.support.sweeps.savings import SAVINGS, Saving
from tests.support.sweeps.trial import Lost, Trial, end_this_process, expect, recover

CODES = (errno.ENOSPC, errno.EIO)
# Operations that need space. Files can still be removed from a full disk.
_GROWING = {"create_folder", "create_file", "write", "truncate", "fsync"}


def errors(folder: Path) -> Iterator[Trial]:
    """Yield trials for each operation of each way of saving."""
    for number, saving in enumerate(SAVINGS):
        place = folder / f"errors-{number}"
        saving.prepare(place)
        count = number_of_operations(partial(saving.save, place))
        for operation, code in product(range(count), CODES):
            fault = f"{errno.errorcode[code]} at operation {operation}"
            yield Trial("failed once", saving.name, fault, partial(_fail, saving, operation, code))
            yield Trial("failed permanently", saving.name, fault, partial(_fail_on, saving, operation, code))


def _fail(saving: Saving, operation: int, code: int, place: Path) -> None:
    saving.prepare(place)
    message = _message(saving, place, counted(operation, failing(code)))
    left = [entry.name for entry in place.iterdir() if entry.name.startswith(".")]
    end_this_process(place)
    found, _ = recover(place)
    expect(found, {1, 2} if message else {2})
    if message:
        _judge(message, place, code)
        if left and found == 1:
            raise Lost(f"{left} was left behind")


def _fail_on(saving: Saving, operation: int, code: int, place: Path) -> None:
    saving.prepare(place)
    message = _message(saving, place, ever_since(operation, code))
    if message:
        _judge(message, place, code)
    # Temporary files that could not be removed are cleaned up after the process has exited.
    end_this_process(place)
    expect(recover(place)[0], {1, 2} if message else {2})
    saving.save(place)
    expect(recover(place)[0], {2})


def ever_since(operation: int, code: int) -> Act:
    """Return an act that fails from an operation on: with a full disk, operations that need space; otherwise, all."""
    count = -1
    fail = failing(code)

    def act(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        broken = count >= operation and (code != errno.ENOSPC or name in _GROWING)
        return fail(name, call, arguments) if broken else call(*arguments)

    return act


def _message(saving: Saving, place: Path, act: Act) -> str:
    """Return the error message, or an empty string if there was no error."""
    with between(act):
        try:
            saving.save(place)
        except CheckpointError as error:
            return str(error)
    return ""


def _judge(message: str, place: Path, code: int) -> None:
    missing = [word for word in (str(place), os.strerror(code), "bytes") if word not in message]
    if missing and "was published, but could not be synced" not in message:
        raise Lost(f"the error does not contain {missing}: {message}")
