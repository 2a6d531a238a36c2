"""Read what trackers have stored."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from stratagem.train.trackers.wandb_log import read_transaction_log


@dataclass(frozen=True)
class Stored:
    """What a store contains of a run.

    Attributes:
        steps: the iterations of each value, in ascending order, with repetitions.
        text: the configuration and the lineage as text.
        outcome: the outcome in the summary.
        best: the best accuracy in the summary.
        runs: the number of runs in the store.
        status: the status of the run, in stores that have one.
    """

    steps: Mapping[str, list[int]]
    text: str
    outcome: str | None
    best: float | None
    runs: int
    status: Any = None


def _steps(points: list[tuple[str, int]]) -> dict[str, list[int]]:
    return {name: sorted(step for other, step in points if other == name) for name, _ in points}


def _csv(folder: Path) -> Stored:
    (path,) = folder.glob("*/metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    description = json.loads(path.with_suffix(".json").read_text())
    summary = description["end"] or {}
    points = [(name, int(row["iter"])) for row in rows for name in row if "/" in name and row[name]]
    return Stored(_steps(points), json.dumps(description), summary.get("outcome"), summary.get("best/val/accuracy"), 1)


def _tensorboard(folder: Path) -> Stored:
    (path,) = folder.glob("*/tensorboard")
    events = EventAccumulator(str(path), purge_orphaned_data=False, size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    texts = {
        name: "".join(each.tensor_proto.string_val[0].decode() for each in events.Tensors(name))
        for name in events.Tags()["tensors"]
    }
    points = [(name, each.step) for name in events.Tags()["scalars"] for each in events.Scalars(name)]
    summary = json.loads(texts.get("run/summary/text_summary", "{}"))
    return Stored(_steps(points), str(texts), summary.get("outcome"), summary.get("best/val/accuracy"), 1)


def _wandb(folder: Path) -> Stored:
    points, texts, summary, ids, status = [], "", {}, set(), None
    for path in sorted(folder.glob("*/wandb/offline-run-*/*.wandb")):
        for data in read_transaction_log(path):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {
                    each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item
                }
                points += [(name, values["iter"]) for name in values if "/" in name]
            elif kind == "run":
                ids.add(record.run.run_id)
                texts += str(record.run)
            elif kind == "summary":
                summary |= {each.key: json.loads(each.value_json) for each in record.summary.update if each.key}
            elif kind == "exit":
                status = record.exit.exit_code
            else:
                texts += str(record)
    return Stored(_steps(points), texts, summary.get("outcome"), summary.get("best/val/accuracy"), len(ids), status)


def _mlflow(folder: Path) -> Stored:
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:

        def rows(query: str) -> list[Any]:
            return connection.execute(query).fetchall()

        latest = dict(rows("SELECT key, value FROM latest_metrics"))
        tags = dict(rows("SELECT key, value FROM tags"))
        texts = f"{tags} {rows('SELECT key, value FROM params')}"
        status = rows("SELECT status FROM runs")
        points = rows("SELECT key, step FROM metrics")
    best = latest.get("summary/best/val/accuracy")
    return Stored(_steps(points), texts, tags.get("stratagem/outcome"), best, len(status), status[0][0])


def _trackio(folder: Path) -> Stored:
    with closing(sqlite3.connect(folder.parent / "trackio" / "stratagem.db")) as connection:
        rows = connection.execute(
            "SELECT step, metrics, run_name FROM metrics WHERE run_name LIKE ?", (f"{folder.name}-%",)
        ).fetchall()
        configs = connection.execute(
            "SELECT config FROM configs WHERE run_name LIKE ?", (f"{folder.name}-%",)
        ).fetchall()
    values = [(step, json.loads(metrics)) for step, metrics, _ in rows]
    summary = next((each for _, each in values if "summary/outcome" in each), {})
    points = [(name, step) for step, each in values for name in each]
    return Stored(
        _steps(points), str(configs), summary.get("summary/outcome"), summary.get("summary/best/val/accuracy"),
        len({name for _, _, name in rows}),
    )  # fmt: skip


STORES: Mapping[str, Callable[[Path], Stored]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
