"""Trackers follow a run through interruptions, failures, rollbacks and resumed sessions."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.train.trackers import TrackedRecord, TrackedRun, Tracker, TrackingEnd
from stratagem.train.trackers.tracker import EndState
from tests.support.ranks import Ranks
from tests.train.spoiled import spoiled_settings
from tests.train.toys import EPOCH, QUIET_HOOKS, VALIDATION, At, settings, stop, train_until_signal

pytestmark = pytest.mark.slow

MakeRunner = Callable[..., Runner]
LOGGED = {**QUIET_HOOKS, "logger": {"interval": 1}, "checkpoint": {"interval": 1, "save_best": "accuracy"}}


@dataclass
class Memory(Tracker):
    """Keeps what it receives, and removes what a resumed run does not keep."""

    runs: list[TrackedRun] = field(default_factory=list)
    records: list[TrackedRecord] = field(default_factory=list)
    ends: list[TrackingEnd] = field(default_factory=list)

    def start(self, run: TrackedRun) -> None:
        self.runs.append(run)
        self.records = [each for each in self.records if run.keeps(each.mode, each.iteration)]

    def log(self, record: TrackedRecord) -> None:
        self.records.append(record)

    def finish(self, end: TrackingEnd) -> None:
        self.ends.append(end)

    def iterations(self, mode: str) -> list[int]:
        """Return the iterations of the records of a mode."""
        return [each.iteration for each in self.records if each.mode == mode]


def tracked(make_runner: MakeRunner, memory: Memory, **changes: Any) -> Runner:
    """Return a tracked run of two epochs with a validation after each."""
    given = {"default_hooks": LOGGED, "train_cfg": {"max_epochs": 2}, **VALIDATION, "trackers": [memory], **changes}
    return make_runner(**given)


def test_a_tracker_receives_records_with_their_position_and_the_summary(make_runner: MakeRunner) -> None:
    """Each log line and validation is a record; at the end, the best and the last values and the outcome follow."""
    memory = Memory()
    tracked(make_runner, memory).train()
    assert memory.iterations("train") == list(range(1, 2 * EPOCH + 1))
    assert memory.iterations("val") == [EPOCH, 2 * EPOCH]
    first, last, goodput = memory.records[0], *memory.records[-2:]
    assert (first.epoch, first.updates) == (1, 1)
    assert {"train/loss", "train/lr", "train/time"} <= first.values.keys()
    assert (last.mode, last.epoch, last.updates) == ("val", 2, 2 * EPOCH)
    (end,) = memory.ends
    best = max(each.values["val/accuracy"] for each in memory.records if each.mode == "val")
    goodput_values = {f"last/{name}": value for name, value in goodput.values.items()}
    assert "last/goodput/goodput" in goodput_values
    assert end.summary() == {
        **goodput_values, "outcome": "complete", "final_epoch": 2, "final_iter": 2 * EPOCH,
        "best/val/accuracy": best, "last/val/accuracy": last.values["val/accuracy"],
    }  # fmt: skip


def test_a_run_resumed_in_its_work_dir_continues_the_tracked_run(make_runner: MakeRunner) -> None:
    """The run failed after its checkpoint; the resumed session has the same ID and logs the discarded iterations again."""
    memory = Memory()

    def fail(run: Any) -> None:
        raise RuntimeError("bad luck")

    with pytest.raises(RuntimeError, match="bad luck"):
        tracked(make_runner, memory, custom_hooks=[At(EPOCH + 3, fail)]).train()
    assert memory.iterations("train")[-1] == EPOCH + 3 - 1
    assert (memory.ends[0].state, memory.ends[0].outcome) == (EndState.FAILED, "failed: RuntimeError: bad luck")
    tracked(make_runner, memory, resume=True).train()
    before, after = memory.runs
    assert (after.id, after.folder) == (before.id, before.folder)
    assert (before.resumed_at, after.resumed_at) == (None, EPOCH)
    assert after.facts["previous_session"] == before.facts["session"]
    assert after.facts["resumed_from"].endswith("best_accuracy_epoch_1")
    assert memory.iterations("train") == list(range(1, 2 * EPOCH + 1))
    assert memory.iterations("val") == [EPOCH, 2 * EPOCH]


def test_a_validation_that_the_checkpoint_does_not_contain_is_tracked_once(make_runner: MakeRunner) -> None:
    """The checkpoint of an epoch is saved before its validation, which the resumed run repeats."""
    memory = Memory()
    hooks = {**LOGGED, "checkpoint": {"interval": 1}}

    def fail(run: Any) -> None:
        raise RuntimeError("bad luck")

    with pytest.raises(RuntimeError, match="bad luck"):
        tracked(make_runner, memory, default_hooks=hooks, custom_hooks=[At(EPOCH + 1, fail)]).train()
    tracked(make_runner, memory, default_hooks=hooks, resume=True).train()
    assert not memory.runs[1].validated
    assert memory.iterations("val") == [EPOCH, 2 * EPOCH]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_started_from_the_checkpoint_of_another_run_is_a_new_run_with_a_link(
    make_runner: MakeRunner, tmp_path: Path, resume: bool
) -> None:
    """With ``load_from``, or resumed in another work directory, the tracked run is a new one and names its parent."""
    memory, other = Memory(), Memory()
    tracked(make_runner, memory, train_cfg={"max_epochs": 1}).train()
    checkpoint = tmp_path / "run" / "epoch_1"
    tracked(make_runner, other, work_dir=tmp_path / "other", load_from=checkpoint, resume=resume).train()
    (first,), (second,) = memory.runs, other.runs
    assert second.id != first.id
    assert second.resumed_at is None
    assert second.facts["parent_run"] == first.id
    assert second.facts["parent_checkpoint"] == str(checkpoint)
    recorded = json.loads((tmp_path / "other" / "trackers.json").read_text())["runs"]
    assert {key: value["parent"] for key, value in recorded.items()} == {second.id: first.id}


def test_a_rollback_discards_what_was_tracked_after_the_checkpoint(make_runner: MakeRunner) -> None:
    """The run is rolled back to iteration 4 when iteration 6 is not finite; each iteration is tracked once."""
    memory = Memory()
    hooks = {
        "nonfinite": {"policy": "rollback"}, "logger": {"interval": 1},
        "checkpoint": {"by_epoch": False, "interval": 4, "save_last": False},
    }  # fmt: skip
    bad = {6: "nan"}
    good_again = At(6, lambda run: bad.clear())
    arguments, _, _ = spoiled_settings(bad, hooks=hooks, custom_hooks=[good_again], trackers=[memory])
    runner = make_runner(**arguments)
    runner.train()
    assert [run.resumed_at for run in memory.runs] == [None, 4]
    assert [end.state for end in memory.ends] == [EndState.ROLLED_BACK, EndState.COMPLETE]
    assert memory.iterations("train") == list(range(1, runner.run.iter + 1))


def test_a_signal_and_a_stop_are_outcomes(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Trackers are also finished when a signal or a hook stops the run."""
    memory = Memory()
    interrupt = At(3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert train_until_signal(tracked(make_runner, memory, custom_hooks=[interrupt])) == 128 + signal.SIGTERM
    tracked(make_runner, memory, work_dir=tmp_path / "stopped", custom_hooks=[At(2, stop)]).train()
    assert [(each.state, each.outcome, each.iteration) for each in memory.ends] == [
        (EndState.INTERRUPTED, "stopped by SIGTERM", 3),
        (EndState.STOPPED, "stopped early", 2),
    ]


def test_learning_rates_are_tracked_by_group(make_runner: MakeRunner) -> None:
    """If parameter groups have different rates, each one is tracked; the log line shows the first."""
    memory = Memory()
    optim = {
        "optimizer": {"type": "SGD", "lr": 0.1}, "paramwise_cfg": {"bias_lr_mult": 2.0},
    }  # fmt: skip
    tracked(make_runner, memory, optim_wrapper=optim, train_cfg={"max_epochs": 1}).train()
    rates = {name: value for name, value in memory.records[0].values.items() if name.startswith("train/lr")}
    assert sorted(rates) == ["train/lr", "train/lr/group_0", "train/lr/group_1"]
    assert sorted({rates["train/lr/group_0"], rates["train/lr/group_1"]}) == pytest.approx([0.1, 0.2])


def test_updates_are_counted_separately_from_iterations(make_runner: MakeRunner) -> None:
    """With gradient accumulation, records have the number of optimizer updates."""
    memory = Memory()
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 2}
    tracked(make_runner, memory, optim_wrapper=optim, train_cfg={"max_epochs": 1}).train()
    assert [(each.iteration, each.updates) for each in memory.records[:4]] == [(1, 0), (2, 1), (3, 1), (4, 2)]


def test_secrets_of_the_configuration_are_masked(make_runner: MakeRunner) -> None:
    """Trackers receive the configuration as it is saved: the values of secrets are replaced."""
    memory = Memory()
    cfg = {"vars": {"api_token": "hunter2hunter2", "lr": 0.1}}
    tracked(make_runner, memory, cfg=cfg, train_cfg={"max_epochs": 1}).train()
    assert memory.runs[0].config == {"vars": {"api_token": "{{ $SECRET:vars.api_token }}", "lr": 0.1}}


class Hanging(Memory):
    """A tracker that never returns."""

    flush_s = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def start(self, run: TrackedRun) -> None:
        self.gate.wait()


def test_a_run_ends_although_a_tracker_hangs(make_runner: MakeRunner, tmp_path: Path) -> None:
    """The training completes and saves its checkpoints; the other trackers have all records."""
    hanging, memory = Hanging(), Memory()
    tracked(make_runner, memory, trackers=[hanging, memory]).train()
    assert memory.iterations("train") == list(range(1, 2 * EPOCH + 1))
    assert (tmp_path / "run" / "epoch_2").is_dir()
    hanging.gate.set()


def test_the_tracker_in_the_documentation_has_each_iteration_once(make_runner: MakeRunner, tmp_path: Path) -> None:
    """The example in ``docs/trackers.md`` runs, and a resumed run replaces the discarded iterations in its file."""
    text = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class JsonTracker" in block)
    names: dict[str, Any] = {}
    exec(code.replace("@TRACKERS.register_module()\n", ""), names)
    options = {"trackers": [names["JsonTracker"]("all.json")], "default_hooks": LOGGED, **VALIDATION}
    make_runner(**options, train_cfg={"max_epochs": 2}).train()
    options["trackers"] = [names["JsonTracker"]("all.json")]
    make_runner(**options, train_cfg={"max_epochs": 3}, resume=tmp_path / "run" / "epoch_1").train()
    (path,) = (tmp_path / "run").glob("*/all.json")
    records = json.loads(path.read_text())
    assert [each["iter"] for each in records if each["mode"] == "train"] == list(range(1, 3 * EPOCH + 1))
    assert [each["iter"] for each in records if each["mode"] == "val"] == [EPOCH, 2 * EPOCH, 3 * EPOCH]


def train_on_ranks(folder: str) -> tuple[int, int, str | None]:
    """Train with two ranks; return the number of sessions and of records of this rank, and the ID in the checkpoint."""
    memory = Memory()
    changes = {"default_hooks": LOGGED, "train_cfg": {"max_epochs": 1}, **VALIDATION, "trackers": [memory]}
    runner = Runner(**settings(**changes, strategy="DDPStrategy", work_dir=folder))
    try:
        runner.train()
        return (
            len(memory.runs),
            len(memory.iterations("train")),
            runner.run.tracking.as_meta().get("tracking", {}).get("id"),
        )
    finally:
        runner.close()


def test_trackers_run_on_the_first_rank(ranks: Ranks, tmp_path: Path) -> None:
    """With several ranks, the run is tracked once."""
    (first, other) = ranks.run(train_on_ranks, str(tmp_path))
    assert first[:2] == (1, 4)
    assert other == (0, 0, None)


def test_a_run_without_trackers_has_no_tracking_in_its_checkpoints(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Nothing is recorded if there is no tracker."""
    runner = make_runner(default_hooks=LOGGED, train_cfg={"max_epochs": 1}, **VALIDATION)
    runner.train()
    assert runner.run.tracking.as_meta() == {}
    assert not (tmp_path / "run" / "trackers.json").exists()
