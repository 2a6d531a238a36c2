from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.errors import ConfigValueError
from stratagem.train import CheckpointHook, Hook
from tests.train.toys import EPOCH, QUIET_HOOKS, Recorder

MakeRunner = Callable[..., Runner]


def saved(make_runner: MakeRunner, hook: dict, *, train_cfg: dict, **changes: Any) -> list[str]:
    """Return the names of the checkpoints in a run's directory after training."""
    runner = make_runner(default_hooks={**QUIET_HOOKS, "checkpoint": hook}, train_cfg=train_cfg, **changes)
    runner.train()
    names = [path.name for path in Path(runner.strategy.work_dir).iterdir()]
    return sorted(name for name in names if name not in {runner.strategy.timestamp, "last_checkpoint"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "epochs"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"interval": 2}, [2, 4, 5]),
        ({"interval": 2, "save_last": False}, [2, 4]),
        ({"interval": 2, "save_begin": 3}, [4, 5]),
        ({"interval": -1}, [5]),
    ],
)
def test_checkpoints_are_saved_at_every_interval_and_at_the_end(make_runner: MakeRunner, hook: dict, epochs: list[int]):
    """By default, a checkpoint is saved after every epoch; with an interval of -1, only at the end."""
    assert saved(make_runner, hook, train_cfg={"max_epochs": 5}) == [f"epoch_{epoch}" for epoch in epochs]


@pytest.mark.parametrize("train_cfg", [{"max_iters": 10}, {"max_epochs": 2}])
def test_the_interval_can_count_iterations(make_runner: MakeRunner, train_cfg: dict):
    """With ``by_epoch=False``, a run of either kind saves every ``interval`` iterations and after the last one."""
    last = train_cfg.get("max_iters", 2 * EPOCH)
    names = saved(make_runner, {"interval": 4, "by_epoch": False}, train_cfg=train_cfg)
    assert names == sorted(f"iter_{number}" for number in {4, 8, *range(4, last + 1, 4), last})


def test_a_name_with_the_suffix_pth_saves_single_files(make_runner: MakeRunner, tmp_path: Path):
    """A single file has the keys that other tools expect."""
    names = saved(make_runner, {"filename_tmpl": "epoch_{}.pth"}, train_cfg={"max_epochs": 1})
    assert names == ["epoch_1.pth"]
    checkpoint = CheckpointLoader.load_checkpoint(tmp_path / "run" / "epoch_1.pth")
    assert {"meta", "state_dict", "optimizer"} <= set(checkpoint)
    assert (checkpoint["meta"]["epoch"], checkpoint["meta"]["iter"]) == (1, EPOCH)


def test_out_dir_has_a_subdirectory_for_the_run(make_runner: MakeRunner, tmp_path: Path):
    """The subdirectory of ``out_dir`` is named after the work directory, so that several runs can share ``out_dir``."""
    names = saved(make_runner, {"out_dir": tmp_path / "store"}, train_cfg={"max_epochs": 1})
    assert names == []
    assert (tmp_path / "store" / "run" / "epoch_1").is_dir()


@pytest.mark.slow
def test_optimizer_and_schedules_can_be_omitted(make_runner: MakeRunner, tmp_path: Path):
    """With ``save_optimizer=False`` and ``save_param_scheduler=False``, a checkpoint contains only the weights."""
    schedule = {"type": "ExponentialLR", "gamma": 0.9}
    whole = {"state_dict", "optimizer", "param_schedulers"}
    saved(make_runner, {}, train_cfg={"max_epochs": 1}, param_scheduler=schedule)
    assert whole <= set(CheckpointLoader.load_checkpoint(tmp_path / "run" / "epoch_1"))
    hook = {"save_optimizer": False, "save_param_scheduler": False}
    saved(make_runner, hook, train_cfg={"max_epochs": 1}, param_scheduler=schedule, work_dir=tmp_path / "small")
    assert whole & set(CheckpointLoader.load_checkpoint(tmp_path / "small" / "epoch_1")) == {"state_dict"}


@pytest.mark.slow
def test_hooks_can_add_data_to_a_checkpoint_and_read_it_back(make_runner: MakeRunner, tmp_path: Path):
    """Data added in ``before_save_checkpoint`` is available in ``after_load_checkpoint``."""

    class Diary(Hook):
        def __init__(self) -> None:
            self.read: list[Any] = []

        def before_save_checkpoint(self, run: Any, checkpoint: dict) -> None:
            checkpoint["diary"] = {"page": run.epoch + 1}

        def after_load_checkpoint(self, run: Any, checkpoint: dict) -> None:
            self.read.append(checkpoint["diary"])

    saved(make_runner, {}, train_cfg={"max_epochs": 1}, custom_hooks=[Diary()])
    diary = Diary()
    make_runner(resume=True, custom_hooks=[diary], train_cfg={"max_epochs": 1}).train()
    assert diary.read == [{"page": 1}]
    make_runner(load_from=tmp_path / "run" / "epoch_1", custom_hooks=[diary], train_cfg={"max_epochs": 1}).train()
    assert len(diary.read) == 2


@pytest.mark.slow
def test_load_from_loads_the_weights_and_starts_a_new_run(make_runner: MakeRunner, tmp_path: Path):
    """After loading weights with ``load_from``, the epoch and the iteration start at zero."""
    saved(make_runner, {}, train_cfg={"max_epochs": 1})
    recorder = Recorder()
    make_runner(load_from=tmp_path / "run" / "epoch_1", custom_hooks=[recorder], train_cfg={"max_epochs": 1}).train()
    assert [row[:2] for row in recorder.rows] == [(0, batch) for batch in range(EPOCH)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"save_begin": -1}, "expected save_begin >= 0, got -1"), ({"filename_tmpl": "last.pth"}, "needs a {}")],
)
def test_wrong_arguments_are_rejected(arguments: dict, text: str):
    """Invalid arguments raise errors, such as a template without a number, whose checkpoints would overwrite each other."""
    with pytest.raises(ConfigValueError, match=text.replace("{", r"\{").replace("}", r"\}")):
        CheckpointHook(**arguments)
