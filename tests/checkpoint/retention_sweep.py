"""Save, update the pointer and remove in child processes that are killed at every file operation, keeping one checkpoint.

This is a script, so that the process that forks has no threads. It prints the results of the children as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from stratagem.checkpoint import (
    BackgroundSaver,
    CheckpointLoader,
    Retention,
    RetentionTag,
    checkpoints_of_run,
    find_latest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    update_last_checkpoint,
)
from stratagem.dist import SINGLE_PROCESS, RankGroup
from stratagem.storage import clean_temporaries
from tests.support import faults

LOGGER = logging.getLogger("sweep")
POLICY = Retention(groups=("iter_{}",), last=1)


def tree(number: int) -> dict[str, Any]:
    """Return a state in which every part contains ``number``."""
    purpose = RetentionTag(group="iter_{}", number=number).as_meta()
    meta = {"iter": number, "run_id": "me", "purpose": purpose}
    return {"meta": meta, "state_dict": {"x": torch.full((999,), number)}, "optimizer": {"m": torch.full((9,), number)}}


def tidy(folder: Path, path: Path) -> None:
    """Update the pointer and remove old checkpoints, as a run does after a save."""
    update_last_checkpoint(path, folder)
    remove_checkpoints(
        [each.path for each in POLICY.select_removable(checkpoints_of_run("me", folder), {path})], LOGGER
    )


def save(folder: Path, number: int, *, background: bool) -> None:
    """Save as a run does, in the foreground or in the background."""
    path = folder / f"iter_{number}"
    if not background:
        save_checkpoint(tree(number), path)
        tidy(folder, path)
        return
    saver = BackgroundSaver(LOGGER)

    def then(rank_group: RankGroup) -> None:
        rank_group.run_on_rank0(lambda: tidy(folder, path))

    saver.save(tree(number), path, SINGLE_PROCESS, then=then)
    saver.wait()
    saver.close()


def status_of_child(work: Callable[[], None], act: faults.Act) -> int:
    """Do the work in a forked child; return its exit status."""
    child = os.fork()
    if child == 0:
        with faults.between(act):
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def operations_of_a_save(place: Path) -> list[str]:
    """Return the names of the file operations of a save that replaces the only checkpoint."""
    names: list[str] = []

    def note(name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        names.append(name)
        return operation(*arguments)

    place.mkdir()
    save(place, 1, background=False)
    with faults.between(note):
        save(place, 2, background=False)
    return names


def sweep(folder: Path, *, background: bool) -> dict[str, Any]:
    """Kill a child at every operation of a save that replaces the only checkpoint."""
    results: dict[str, Any] = {"killed": 0, "lost": [], "most": 0, "after_next_start": set(), "status": set()}
    for number, operation in enumerate(operations_of_a_save(folder / "count")):
        # "Before one operation" is the same as "after the previous one".
        for moment in ("before", "half-way") if operation == "write" else ("before",):
            place = folder / f"{number}-{moment}"
            place.mkdir()
            save(place, 1, background=False)
            act = faults.counted(number, faults.dying(moment))
            results["status"].add(status_of_child(lambda place=place: save(place, 2, background=background), act))
            results["killed"] += 1
            latest = find_latest_checkpoint(place)
            found = (
                CheckpointLoader.load_checkpoint(latest)
                if latest
                else {"meta": {"iter": 0}, "state_dict": {"x": torch.zeros(1)}}
            )
            if set(found["state_dict"]["x"].tolist()) != {found["meta"]["iter"]} or found["meta"]["iter"] < 1:
                results["lost"].append([number, moment])
            results["most"] = max(results["most"], len(checkpoints_of_run("me", place)))
            clean_temporaries(place)
            tidy(place, latest or place)
            results["after_next_start"].add(
                len([entry for entry in place.iterdir() if entry.name != "last_checkpoint"])
            )
    return {**results, "after_next_start": sorted(results["after_next_start"]), "status": sorted(results["status"])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(sweep(Path(sys.argv[1]), background="background" in sys.argv[2:])))  # noqa: T201 -- the answer
