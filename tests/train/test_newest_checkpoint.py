"""Which checkpoint a run resumes from: the one that it saved last, whatever its name, its iteration and the clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_keeping import scored
from toys import QUIET_HOOKS, At, loader, settings, stop

from manifests import change_manifest
from ranks import Ranks
from stratagem import Runner
from stratagem.checkpoint import (
    SaveOrder,
    checkpoints_by_run,
    find_latest_checkpoint,
    find_latest_remote,
    list_checkpoints,
    read_any,
    remote_save_orders,
)
from stratagem.errors import CheckpointDamagedError, ConfigValueError, TrainingError
from stratagem.train import CheckpointHook, Hook
from stratagem.train.resume.rollback import RollBackError

MakeRunner = Callable[..., Runner]
FUTURE = 4e9


class Killed(Exception):  # noqa: N818 -- what happens to the run
    """Ends a training without a last checkpoint, as a kill does."""


def kill(run: Any) -> None:
    """End the training between two saves."""
    raise Killed


def train(make_runner: MakeRunner, *actions: At, iterations: int = 20, **changes: Any) -> Runner:
    """Save every second iteration of a run until it ends or is killed."""
    hook = {"by_epoch": False, "interval": 2, "save_last": False, **changes.pop("hook", {})}
    runner = make_runner(
        default_hooks={**QUIET_HOOKS, "checkpoint": hook},
        custom_hooks=list(actions),
        train_cfg={"by_epoch": False, "max_iters": iterations},
        **changes,
    )
    if any(each.action is kill for each in actions):
        with pytest.raises(Killed):
            runner.train()
    else:
        runner.train()
    return runner


def set_clock_back(run_or_folder: Any) -> None:
    """Make all that is saved from now on older, by the clock, than what there is."""
    folder = run_or_folder if isinstance(run_or_folder, Path) else Path(run_or_folder.work_dir)
    for each in list_checkpoints(folder):
        if each.path.is_dir():
            change_manifest(each.path, saved_at=FUTURE + each.number)
        else:
            os.utime(each.path, (FUTURE + each.number,) * 2)


def assert_newest(make_runner: MakeRunner, folder: Path, name: str, **changes: Any) -> None:
    """Hold every place that names a newest checkpoint to one name; at last the run resumes from it."""
    assert find_latest_checkpoint(folder) == folder / name
    assert list_checkpoints(folder)[0].path == folder / name
    (saved,) = checkpoints_by_run(folder).values()
    assert saved[-1].path == folder / name
    assert (folder / "last_checkpoint").read_text() == f"{name}\n"
    again = make_runner(resume=True, **changes)
    again.prepare()
    assert again.run.iter == read_any(folder / name)["meta"]["iter"]


FORMS = [{}, {"filename_tmpl": "at_{:03d}.pt"}]
NAMES: list[Callable[[int], str]] = ["iter_{}".format, "at_{:03d}.pt".format]
each_form = pytest.mark.parametrize(("form", "name"), list(zip(FORMS, NAMES, strict=True)), ids=["folders", "files"])


@each_form
@pytest.mark.parametrize("most", [-1, 1])
def test_a_clock_that_is_set_back_between_sessions_loses_nothing(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any, most: int
):
    """The second session's checkpoint is the newest, and retention keeps it, though the first's are later by the clock."""
    hook = {**form, "max_keep_ckpts": most}
    train(make_runner, At(5, kill), hook=hook)
    set_clock_back(tmp_path / "run")
    train(make_runner, At(11, kill), hook=hook, resume=True)
    assert_newest(make_runner, tmp_path / "run", name(10))
    if most == 1:
        assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == [name(10)]


@each_form
@pytest.mark.parametrize("most", [-1, 1])
def test_a_clock_that_is_set_back_within_a_session_loses_nothing(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any, most: int
):
    """What is saved after that is the newest, and retention keeps it."""
    hook = {**form, "max_keep_ckpts": most}
    train(make_runner, At(5, set_clock_back), At(9, kill), hook=hook)
    assert_newest(make_runner, tmp_path / "run", name(8))
    if most == 1:
        assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == [name(8)]


@each_form
def test_a_run_that_was_resumed_from_an_older_checkpoint_resumes_there(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any
):
    """The newer iterations that it left behind do not win, even with a later time."""
    train(make_runner, At(13, kill), hook=form)
    set_clock_back(tmp_path / "run")
    train(make_runner, At(7, kill), hook=form, resume=tmp_path / "run" / name(4))
    assert_newest(make_runner, tmp_path / "run", name(6))
    # What goes first is what was left behind, although its numbers are higher.
    train(make_runner, iterations=10, hook={**form, "max_keep_ckpts": 2}, resume=True)
    assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == [name(10), name(8)]


@each_form
def test_a_run_that_was_rolled_back_resumes_behind_the_rollback(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any
):
    """What it saved before the rollback, at higher iterations and with a later time, does not win."""

    def roll_back(run: Any) -> None:
        if rolled_back:
            return
        rolled_back.append(True)
        set_clock_back(run)
        raise RollBackError("spoiled", Path(run.work_dir) / name(2), iteration=7, epoch=1, batch=0)

    rolled_back: list[bool] = []
    # At the fifth iteration for the second time.
    times = At(5, lambda run: kill(run) if rolled_back else None)
    hooks = [At(7, roll_back), times]
    hook = {"by_epoch": False, "interval": 2, "save_last": False, **form}
    runner = make_runner(
        default_hooks={**QUIET_HOOKS, "checkpoint": hook},
        custom_hooks=hooks,
        train_cfg={"by_epoch": True, "max_epochs": 3},
    )
    with pytest.raises(Killed):
        runner.train()
    assert (tmp_path / "run" / name(6)).exists()
    assert_newest(make_runner, tmp_path / "run", name(4))


@each_form
def test_of_two_sessions_from_one_checkpoint_the_second_is_the_newer(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any
):
    """Although the first came further, and its checkpoints have a later time."""
    train(make_runner, At(5, kill), hook=form)
    train(make_runner, At(13, kill), hook=form, resume=tmp_path / "run" / name(4))
    set_clock_back(tmp_path / "run")
    train(make_runner, At(9, kill), hook=form, resume=tmp_path / "run" / name(4))
    assert_newest(make_runner, tmp_path / "run", name(8))
    orders = {each.path.name: each.order for each in list_checkpoints(tmp_path / "run")}
    found = {key: (order.session, order.save) for key, order in orders.items() if order is not None}
    # The third session replaced what the second had saved at 6 and 8.
    assert found == {
        name(2): (1, 1),
        name(4): (1, 2),
        name(10): (2, 3),
        name(12): (2, 4),
        name(6): (3, 1),
        name(8): (3, 2),
    }


def test_two_trainings_of_one_program_are_two_sessions(make_runner: MakeRunner, tmp_path: Path):
    """Between them another process may have trained in the folder: its checkpoint must not look newer than the third's."""
    first = train(make_runner, At(4, stop), hook={"interval": 1})
    train(make_runner, At(6, stop), hook={"interval": 1}, resume=True)
    first.run.progress.stop_training = False
    set_clock_back(tmp_path / "run")
    first.run.events.hooks[:] = [hook for hook in first.run.events.hooks if not isinstance(hook, At)]
    first.train()
    newest = list_checkpoints(tmp_path / "run")[0]
    assert newest.order is not None
    assert (newest.order.session, newest.path.name) == (3, "iter_20")


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_it(make_runner: MakeRunner, tmp_path: Path):
    """By the order in which they were saved, not by time."""
    train(make_runner, At(5, kill))
    set_clock_back(tmp_path / "run")
    train(make_runner, At(9, kill), resume=True)
    (tmp_path / "run" / "iter_8" / "manifest.json").write_text("{")
    again = make_runner(resume=True)
    again.prepare()
    assert again.run.iter == 6


def test_a_checkpoint_in_another_folder_is_newer_after_it_was_resumed_from(make_runner: MakeRunner, tmp_path: Path):
    """A session that continues a run in a new folder is later than the one whose checkpoint it resumed from."""
    train(make_runner, At(5, kill))
    train(make_runner, At(9, kill), resume=True)
    train(make_runner, At(11, kill), resume=tmp_path / "run" / "iter_8", work_dir=tmp_path / "other")
    (newest, *_) = list_checkpoints(tmp_path / "other")
    assert newest.order is not None
    assert newest.order.session == 3


def test_a_job_that_is_started_again_goes_on_with_its_own_run(
    make_runner: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An older run in the folder has checkpoints with a later time; resuming those would lose the job's own progress."""
    train(make_runner, At(11, kill))
    set_clock_back(tmp_path / "run")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = train(make_runner, At(5, kill), hook={"filename_tmpl": "e_{}.pth"})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record = tmp_path / "run" / ".launch.json"
    record.write_text(record.read_text().replace(f"[{os.getpid()},", "[1,"))
    second = train(make_runner, At(7, kill), hook={"filename_tmpl": "e_{}.pth"})
    assert second.run.id == first.run.id
    assert second.run.iter == 6
    newest = next(each for each in list_checkpoints(tmp_path / "run") if each.run_id == first.run.id)
    assert (newest.path.name, newest.order) == ("e_6.pth", SaveOrder(3, 1))


def test_what_was_saved_to_a_url_counts(make_runner: MakeRunner):
    """A run resumed from an older checkpoint there is later than what it left behind; the pointer names no URL."""
    pytest.importorskip("fsspec")
    url = "memory://newest/run"

    def publish(run: Any) -> None:
        run.save_checkpoint(f"{url}/iter_{run.iter + 1}", run.progress.after_this_iteration())

    never = {"interval": -1}
    first = train(make_runner, At(2, publish), At(4, publish), At(5, kill), hook=never)
    assert not (Path(first.run.work_dir) / "last_checkpoint").exists()
    train(
        make_runner, At(6, publish), At(7, kill), hook=never, resume=f"{url}/iter_4", work_dir=first.run.work_dir + "_2"
    )
    # Published again under the same name, which says nothing of its age.
    train(
        make_runner, At(4, publish), At(5, kill), hook=never, resume=f"{url}/iter_2", work_dir=first.run.work_dir + "_3"
    )
    assert find_latest_remote(url) == f"{url}/iter_4"
    assert [order.session for order in remote_save_orders(url)] == [1, 2, 3]


def train_on_ranks(folder: str, last: int, **changes: Any) -> tuple[int, int, list[SaveOrder | None]]:
    """Train on all ranks until a rank's hook ends the training; return where it began and ended, and what it saved."""
    began: list[int] = []

    class Begin(Hook):
        def before_train(self, run: Any) -> None:
            began.append(run.iter)

    hook = {"by_epoch": False, "interval": 2, "save_last": False, "async_save": True}
    runner = Runner(
        **settings(
            train_dataloader=loader(), work_dir=folder, custom_hooks=[Begin(), At(last, stop)],
            default_hooks={**QUIET_HOOKS, "checkpoint": hook}, **changes,
        )
    )  # fmt: skip
    try:
        runner.train()
        return began[0], runner.run.iter, [each.order for each in list_checkpoints(folder)]
    finally:
        runner.close()


@pytest.mark.slow
def test_ranks_agree_on_the_number_of_their_session(ranks: Ranks, tmp_path: Path):
    """Saved in the background: the second session goes on from the first one's last, and the third from the second's."""
    assert ranks.run(train_on_ranks, str(tmp_path), 4) == [(0, 4, [SaveOrder(1, 2), SaveOrder(1, 1)])] * 2
    set_clock_back(tmp_path)
    orders = [SaveOrder(2, 1), SaveOrder(1, 2), SaveOrder(1, 1)]
    assert ranks.run(train_on_ranks, str(tmp_path), 6, resume=True) == [(4, 6, orders)] * 2
    orders = [SaveOrder(3, 1), *orders]
    assert ranks.run(train_on_ranks, str(tmp_path), 8, resume=True) == [(6, 8, orders)] * 2


# ---- going back -------------------------------------------------------------------------------------------------------


def spoil(*iterations: int) -> Hook:
    """Make the weights of an iteration NaN, once."""
    left = list(iterations)

    class Spoil(Hook):
        def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
            if left and run.iter + 1 == left[0]:
                left.pop(0)
                data_batch[0].fill_(float("nan"))

    return Spoil()


def test_a_rollback_does_not_take_another_run_s_checkpoint(make_runner: MakeRunner):
    """A new run in the folder of an old one has nothing to go back to before its own first checkpoint."""
    train(make_runner, At(5, kill))
    hooks = {**QUIET_HOOKS, "nonfinite": {"policy": "rollback"}, "checkpoint": {"interval": -1, "save_last": False}}
    runner = make_runner(default_hooks=hooks, custom_hooks=[spoil(3)])
    with pytest.raises(TrainingError, match="no checkpoint to roll back to"):
        runner.train()


def test_a_rollback_goes_back_to_what_the_session_was_resumed_from(make_runner: MakeRunner, tmp_path: Path):
    """Not to the newer checkpoints that it was resumed to leave behind, which would be a step forward."""
    train(make_runner, At(13, kill))
    seen: list[int] = []
    hooks = {**QUIET_HOOKS, "nonfinite": {"policy": "rollback"}, "checkpoint": {"interval": -1, "save_last": False}}
    runner = make_runner(
        default_hooks=hooks,
        custom_hooks=[spoil(6), At(5, lambda run: seen.append(run.iter)), At(8, stop)],
        resume=tmp_path / "run" / "iter_4",
        train_cfg={"by_epoch": False, "max_iters": 20},
    )
    runner.train()
    # The fifth iteration was trained again after the rollback to the fourth.
    assert seen == [4, 4]
    assert runner.run.iter == 8


# ---- whatever its name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["e_{}.pth", "iter_{}.pt", "{:04d}.ckpt", "model-{}.bin", "step={}", "a{}b"])
@pytest.mark.parametrize("background", [False, True])
def test_a_run_finds_what_it_saved_under_any_name(
    make_runner: MakeRunner, tmp_path: Path, template: str, *, background: bool
):
    """It does not begin at 0 and overwrite its checkpoints."""
    hook = {"filename_tmpl": template, "async_save": background}
    train(make_runner, At(5, kill), hook=hook)
    again = make_runner(resume=True)
    again.prepare()
    assert again.run.iter == 4
    assert find_latest_checkpoint(tmp_path / "run") == tmp_path / "run" / template.format(4)


def test_a_best_checkpoint_is_found_where_the_run_saves_no_other(make_runner: MakeRunner, tmp_path: Path):
    """In a single file as in a folder."""
    for suffix in ("", ".pth"):
        hook = {"filename_tmpl": f"epoch_{{}}{suffix}", "save_best": "acc", "interval": -1, "save_last": False}
        work_dir = tmp_path / f"run{suffix}"
        runner = make_runner(
            default_hooks={**QUIET_HOOKS, "checkpoint": hook},
            custom_hooks=[At(15, kill)],
            work_dir=work_dir,
            **scored(0.1, 0.2, 0.0),
        )
        with pytest.raises(Killed):
            runner.train()
        assert find_latest_checkpoint(work_dir) == work_dir / f"best_acc_epoch_2{suffix}"
        again = make_runner(resume=True, work_dir=work_dir)
        again.prepare()
        assert again.run.epoch == 2


def test_files_that_the_run_did_not_save_are_not_resumed_from(make_runner: MakeRunner, tmp_path: Path):
    """Neither weights that lie in its folder, nor files that published_keys made, though those are newer."""
    hook = {"filename_tmpl": "e_{}.pth", "published_keys": ["meta", "state_dict"], "save_last": True}
    train(make_runner, iterations=4, hook=hook)
    weights = {"layers.0.weight": torch.zeros(8, 4)}
    torch.save(weights, tmp_path / "run" / "pretrained.pth")
    torch.save({"state_dict": weights, "meta": {"epoch": 9, "iter": 99}}, tmp_path / "run" / "another.pt")
    torch.save(weights, tmp_path / "run" / "old_form.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "run" / "notes.pth").write_text("no checkpoint")
    (published,) = (tmp_path / "run").glob("e_4-*.pth")
    for path in (tmp_path / "run").glob("*.p*"):
        if not path.name.startswith("e_") or path == published:
            os.utime(path, (FUTURE, FUTURE))
    assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == ["e_4.pth", "e_2.pth"]
    train(make_runner, iterations=6, hook={**hook, "max_keep_ckpts": 1, "published_keys": None}, resume=True)
    # Retention leaves them alone, too.
    assert published.exists()


def test_files_published_before_they_were_marked_are_not_resumed_from(make_runner: MakeRunner, tmp_path: Path):
    """They hold the run's id, but only some of the parts, under a name that ends in eight digits of a digest."""
    train(make_runner, iterations=4, hook={"filename_tmpl": "e_{}.pth"})
    saved = read_any(tmp_path / "run" / "e_4.pth")
    torch.save({"meta": saved["meta"], "state_dict": saved["state_dict"]}, tmp_path / "run" / "e_4-0123abcd.pth")
    assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == ["e_4.pth", "e_2.pth"]


@pytest.mark.parametrize(
    ("suffix", "damaged"),
    [
        ("", lambda data: data[:-200]),
        (".pth", lambda data: data[:-200]),
        (".pth", lambda data: bytes(len(data))),
        (".pt", lambda data: b""),
    ],
)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_at_zero(
    make_runner: MakeRunner, tmp_path: Path, suffix: str, damaged: Callable[[bytes], bytes]
):
    """Whatever their names: it would overwrite what could perhaps be repaired."""
    train(make_runner, iterations=4, hook={"filename_tmpl": f"e_{{}}{suffix}"})
    for number in (2, 4):
        path = tmp_path / "run" / f"e_{number}{suffix}"
        file = path if suffix else path / "manifest.json"
        file.write_bytes(damaged(file.read_bytes()))
    with pytest.raises(CheckpointDamagedError, match=r"None of the 2 checkpoints"):
        make_runner(resume=True).prepare()


def test_a_run_that_saves_elsewhere_finds_it_without_the_pointer(make_runner: MakeRunner, tmp_path: Path):
    """As when it was killed before the pointer was written, or the pointer names another checkpoint since."""
    hook = {"filename_tmpl": "e_{}.pth", "out_dir": tmp_path / "big"}
    train(make_runner, At(5, kill), hook=hook)
    (tmp_path / "run" / "last_checkpoint").unlink()
    again = make_runner(resume=True)
    again.prepare()
    assert again.run.iter == 4
    set_clock_back(tmp_path / "run")
    train(make_runner, At(7, kill), hook=hook, resume=True)
    assert find_latest_checkpoint(tmp_path / "run") == tmp_path / "big" / "run" / "e_6.pth"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("latest.pth", "names every checkpoint alike"),
        ("{epoch}.pth", "cannot be filled with a number: KeyError"),
        ("{:q}", "cannot be filled with a number: ValueError"),
        ("epochs/{}.pth", "has a folder in it.*out_dir"),
        (".e_{}", "hidden names"),
    ],
)
def test_names_that_would_not_be_found_are_refused(template: str, text: str):
    """Before anything is trained."""
    with pytest.raises(ConfigValueError, match=text):
        CheckpointHook(filename_tmpl=template)
