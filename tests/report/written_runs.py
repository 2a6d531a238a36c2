"""Write the files of runs without training: records, times, logs and session records."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stratagem.train.goodput.recorder import TIMES
from stratagem.train.run.run_history import RECORD

FIRST, SECOND = "20260101_100000", "20260101_110000"
BEGAN = 1_767_261_600.0


def write_session(
    work_dir: Path,
    name: str,
    *,
    records: Iterable[Mapping[str, Any] | str] = (),
    times: Iterable[Mapping[str, Any]] = (),
    log: str = "",
    lineage: Iterable[Mapping[str, Any]] = (),
    ending: Mapping[str, Any] | None = None,
) -> Path:
    """Write the folder of a session; records that are strings are written as they are."""
    folder = work_dir / name
    (folder / "vis_data").mkdir(parents=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / "vis_data" / "scalars.json").write_text("".join(f"{line}\n" for line in lines))
    (folder / TIMES).write_text("".join(json.dumps(record) + "\n" for record in times))
    (folder / f"{name}.log").write_text(log)
    (folder / RECORD).write_text(json.dumps({"lineage": list(lineage), "ending": ending}))
    return folder


def train_record(step: int, **values: Any) -> dict[str, Any]:
    """Return a record of a training iteration."""
    return {**values, "mode": "train", "epoch": 1, "iter": step, "step": step}


def session_entry(name: str, iteration: int, *changes: str, checkpoint: str | None = None) -> dict[str, Any]:
    """Return the entry of a session in the history of its run."""
    return {
        "name": f"run/{name}", "epoch": 0, "iter": iteration, "checkpoint": checkpoint, "changes": list(changes),
        "strategy": "SingleDeviceStrategy", "world_size": 1, "stratagem": "0.2.0",
    }  # fmt: skip


def write_killed_run(work_dir: Path, *, scale: float = 1.0) -> Path:
    """Write a run that was killed at iteration 550, resumed from iteration 400, rolled back, and completed at 1000."""
    noise = random.Random(0)

    def values(step: int) -> dict[str, Any]:
        loss = scale * (2 * math.exp(-step / 200) + 0.3 + 0.05 * noise.random())
        rate = 0.01 * (1 + math.cos(math.pi * step / 1000)) / 2
        return train_record(step, loss=loss, lr=rate, time=0.1, data_time=0.01, host_memory=400 + noise.randrange(5))

    def validation(step: int) -> dict[str, Any]:
        accuracy = 1 - scale * 0.5 * math.exp(-step / 300)
        return {"accuracy": accuracy, "mode": "val", "epoch": 1, "iter": step, "step": step}

    first = [values(step) for step in range(10, 551, 10)] + [validation(step) for step in (200, 400)]
    second = [values(step) for step in range(410, 801, 10)]
    second += [
        {
            "loss": "NaN",
            "mode": "nonfinite",
            "epoch": 1,
            "iter": 805,
            "step": 805,
            "samples": {"0": [7, 8]},
            "parameters": [],
        }
    ]
    second += [values(step) for step in range(710, 1001, 10)] + [validation(step) for step in (600, 800, 1000)]
    start, resumed = session_entry(FIRST, 0), session_entry(SECOND, 400, "lr: 0.01 -> 0.02", checkpoint="run/iter_400")
    write_session(
        work_dir, FIRST, records=first, lineage=[start],
        times=[
            {"event": "begin", "time": BEGAN}, _session("a", 0, 10.0),
            *(_moment("time", step, start=10.0, train=0.1 * step, data=0.01 * step) for step in range(20, 400, 20)),
            _moment("save", 400, start=10.0, train=40.0, data=4.0),
            _moment("saved", 400, start=10.0, train=40.0, data=4.0, save=2.0),
            _moment("time", 550, start=10.0, train=55.0, data=5.5, save=2.0),
        ],
    )  # fmt: skip
    write_session(
        work_dir, SECOND, records=second, lineage=[start, resumed],
        ending={"how": "complete", "epoch": 1, "iter": 1000, "at": "2026-01-01 11:10:00"},
        log="2026/01/01 11:05:00 - stratagem - WARNING - Rolled back.\n",
        times=[
            {"event": "begin", "time": BEGAN + 95.0}, _session("a", 400, 10.0),
            _moment("save", 700, start=10.0, train=30.0), _moment("saved", 700, start=10.0, train=30.0, save=2.0),
            _moment("time", 805, start=10.0, train=40.5, save=2.0),
            _moment("rolled back", 700, start=10.0, train=40.5, save=2.0, other=1.0),
            _moment("end", 1000, start=10.0, train=70.5, save=2.0, evaluation=5.0, other=1.0) | {"outcome": "complete"},
        ],
    )  # fmt: skip
    (work_dir / f"{SECOND}.py").write_text(f"lr = {0.02 * scale}\nmodel = dict(type='Net', api_key='hunter2hunter2')\n")
    return work_dir


def _session(run_id: str, iteration: int, start: float) -> dict[str, Any]:
    return {
        "event": "session", "run_id": run_id, "continues": False, "elapsed": start, "iter": iteration, "start": start,
    }  # fmt: skip


def _moment(event: str, iteration: int, **seconds: float) -> dict[str, Any]:
    return {"event": event, "iter": iteration, "elapsed": sum(seconds.values()), **seconds}
