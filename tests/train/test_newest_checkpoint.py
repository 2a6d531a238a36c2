"""A run resumes from the checkpoint saved last, regardless of its name, its iteration and the clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
from tests.support.manifests import change_manifest
from tests.support.ranks import Ranks
from tests.train.test_checkpoint_keeping import scored
from tests.train.toys import QUIET_HOOKS, At, loader, settings, stop

pytestmark = pytest.mark.slow

MakeRunner = Callable[..., Runner]
FUTURE = 4e9


class Killed(Exception):  # noqa: N818 -- what happens to the run
    """Ends training without a final checkpoint, as a killed process does."""


def kill(run: Any) -> None:
    """End training between two saves."""
    raise Killed


def train(make_runner: MakeRunner, *actions: At, iterations: int = 20, **changes: Any) -> Runner:
    """Train a run that saves every second iteration, until it ends or is killed."""
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
    """Give the existing checkpoints a later time than everything saved from now on."""
    folder = run_or_folder if isinstance(run_or_folder, Path) else Path(run_or_folder.work_dir)
    for each in list_checkpoints(folder):
        if each.path.is_dir():
            change_manifest(each.path, saved_at=FUTURE + each.number)
        else:
            os.utime(each.path, (FUTURE + each.number,) * 2)


def assert_newest(make_runner: MakeRunner, folder: Path, name: str, **changes: Any) -> None:
    """Check that every function reports this checkpoint as the newest and that the run resumes from it."""
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
def test_the_clock_may_be_set_back_between_sessions(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any, most: int
):
    """The second session's checkpoint is the newest and is kept, even if the first session's have later timestamps."""
    hook = {**form, "max_keep_ckpts": most}
    train(make_runner, At(5, kill), hook=hook)
    set_clock_back(tmp_path / "run")
    train(make_runner, At(11, kill), hook=hook, resume=True)
    assert_newest(make_runner, tmp_path / "run", name(10))
    if most == 1:
        assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == [name(10)]


@each_form
@pytest.mark.parametrize("most", [-1, 1])
def test_the_clock_may_be_set_back_within_a_session(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any, most: int
):
    """A checkpoint saved after the clock was set back is the newest and is kept by the retention policy."""
    hook = {**form, "max_keep_ckpts": most}
    train(make_runner, At(5, set_clock_back), At(9, kill), hook=hook)
    assert_newest(make_runner, tmp_path / "run", name(8))
    if most == 1:
        assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == [name(8)]


@each_form
def test_a_run_resumed_from_an_older_checkpoint_resumes_from_its_new_branch(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any
):
    """The iterations that the run abandoned are not the newest, even with a later timestamp."""
    train(make_runner, At(13, kill), hook=form)
    set_clock_back(tmp_path / "run")
    train(make_runner, At(7, kill), hook=form, resume=tmp_path / "run" / name(4))
    assert_newest(make_runner, tmp_path / "run", name(6))
    # The abandoned checkpoints are removed first, although their iteration numbers are higher.
    train(make_runner, iterations=10, hook={**form, "max_keep_ckpts": 2}, resume=True)
    assert [each.path.name for each in list_checkpoints(tmp_path / "run")] == [name(10), name(8)]


@each_form
def test_a_run_that_rolled_back_resumes_after_the_rollback(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any
):
    """A checkpoint saved before the rollback, at a higher iteration and with a later timestamp, is not the newest."""

    def roll_back(run: Any) -> None:
        if rolled_back:
            return
        rolled_back.append(True)
        set_clock_back(run)
        raise RollBackError("spoiled", Path(run.work_dir) / name(2), iteration=7, epoch=1, batch=0)

    rolled_back: list[bool] = []
    # The second time that iteration 5 runs.
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
def test_of_two_sessions_from_one_checkpoint_the_second_is_newer(
    make_runner: MakeRunner, tmp_path: Path, form: dict, name: Any
):
    """Checkpoints of the second of two sessions are newer, even if the first trained further and has later timestamps."""
    train(make_runner, At(5, kill), hook=form)
    train(make_runner, At(13, kill), hook=form, resume=tmp_path / "run" / name(4))
    set_clock_back(tmp_path / "run")
    train(make_runner, At(9, kill), hook=form, resume=tmp_path / "run" / name(4))
    assert_newest(make_runner, tmp_path / "run", name(8))
    orders = {each.path.name: each.order for each in list_checkpoints(tmp_path / "run")}
    found = {key: (order.session, order.save) for key, order in orders.items() if order is not None}
    # The third session overwrote the checkpoints that the second saved at iterations 6 and 8.
    assert found == {
        name(2): (1, 1),
        name(4): (1, 2),
        name(10): (2, 3),
        name(12): (2, 4),
        name(6): (3, 1),
        name(8): (3, 2),
    }


def test_two_calls_of_train_are_two_sessions(make_runner: MakeRunner, tmp_path: Path):
    """Each call of ``train()`` is a new session, because another process may have trained in the directory in between."""
    first = train(make_runner, At(4, stop), hook={"interval": 1})
    train(make_runner, At(6, stop), hook={"interval": 1}, resume=True)
    first.run.progress.stop_training = False
    set_clock_back(tmp_path / "run")
    first.run.events.hooks[:] = [hook for hook in first.run.events.hooks if not isinstance(hook, At)]
    first.train()
    newest = list_checkpoints(tmp_path / "run")[0]
    assert newest.order is not None
    assert (newest.order.session, newest.path.name) == (3, "iter_20")


def test_a_damaged_newest_checkpoint_falls_back_to_the_previous_one(make_runner: MakeRunner, tmp_path: Path):
    """If the newest checkpoint is damaged, the run resumes from the one saved before it, regardless of timestamps."""
    train(make_runner, At(5, kill))
    set_clock_back(tmp_path / "run")
    train(make_runner, At(9, kill), resume=True)
    (tmp_path / "run" / "iter_8" / "manifest.json").write_text("{")
    again = make_runner(resume=True)
    again.prepare()
    assert again.run.iter == 6


def test_a_session_in_another_directory_is_later_than_the_one_it_resumed_from(make_runner: MakeRunner, tmp_path: Path):
    """A session that continues a run in another directory is later than the session that it resumed from."""
    train(make_runner, At(5, kill))
    train(make_runner, At(9, kill), resume=True)
    train(make_runner, At(11, kill), resume=tmp_path / "run" / "iter_8", work_dir=tmp_path / "other")
    (newest, *_) = list_checkpoints(tmp_path / "other")
    assert newest.order is not None
    assert newest.order.session == 3


def test_a_restarted_job_continues_its_own_run(
    make_runner: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An older run in the directory has later timestamps, but a restarted job resumes from its own checkpoints."""
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


def test_checkpoints_saved_to_a_url_are_ordered(make_runner: MakeRunner):
    """Checkpoints saved to a URL are ordered in the same way; the pointer file never names a URL."""
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
    # It is saved again under the same name, so the name does not tell its age.
    train(
        make_runner, At(4, publish), At(5, kill), hook=never, resume=f"{url}/iter_2", work_dir=first.run.work_dir + "_3"
    )
    assert find_latest_remote(url) == f"{url}/iter_4"
    assert [order.session for order in remote_save_orders(url)] == [1, 2, 3]


def train_on_ranks(folder: str, last: int, **changes: Any) -> tuple[int, int, list[SaveOrder | None]]:
    """Train on all ranks until a hook stops the run; return the first and last iteration and the saved orders."""
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
def test_ranks_agree_on_the_session_number(ranks: Ranks, tmp_path: Path):
    """With background saving, each session resumes from the last checkpoint of the previous one on every rank."""
    assert ranks.run(train_on_ranks, str(tmp_path), 4) == [(0, 4, [SaveOrder(1, 2), SaveOrder(1, 1)])] * 2
    set_clock_back(tmp_path)
    orders = [SaveOrder(2, 1), SaveOrder(1, 2), SaveOrder(1, 1)]
    assert ranks.run(train_on_ranks, str(tmp_path), 6, resume=True) == [(4, 6, orders)] * 2
    orders = [SaveOrder(3, 1), *orders]
    assert ranks.run(train_on_ranks, str(tmp_path), 8, resume=True) == [(6, 8, orders)] * 2


# ---- rollback
# ----------------------------------------------------------------------------------------------------------


def spoil(*iterations: int) -> Hook:
    """Set the input of each given iteration to NaN, once."""
    left = list(iterations)

    class Spoil(Hook):
        def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
            if left and run.iter + 1 == left[0]:
                left.pop(0)
                data_batch[0].fill_(float("nan"))

    return Spoil()


def test_a_rollback_does_not_use_the_checkpoint_of_another_run(make_runner: MakeRunner):
    """A new run in the directory of an old one cannot roll back before it has saved its own first checkpoint."""
    train(make_runner, At(5, kill))
    hooks = {**QUIET_HOOKS, "nonfinite": {"policy": "rollback"}, "checkpoint": {"interval": -1, "save_last": False}}
    runner = make_runner(default_hooks=hooks, custom_hooks=[spoil(3)])
    with pytest.raises(TrainingError, match="no checkpoint to roll back to"):
        runner.train()


def test_a_rollback_returns_to_the_checkpoint_that_the_session_resumed_from(make_runner: MakeRunner, tmp_path: Path):
    """A rollback does not use newer checkpoints that the session abandoned."""
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
    # Iteration 5 ran again after the rollback to iteration 4.
    assert seen == [4, 4]
    assert runner.run.iter == 8


# ---- file names
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["e_{}.pth", "iter_{}.pt", "{:04d}.ckpt", "model-{}.bin", "step={}", "a{}b"])
@pytest.mark.parametrize("background", [False, True])
def test_a_run_finds_its_checkpoints_under_any_name(
    make_runner: MakeRunner, tmp_path: Path, template: str, *, background: bool
):
    """A run resumes from a checkpoint with any file name instead of starting at 0 and overwriting it."""
    hook = {"filename_tmpl": template, "async_save": background}
    train(make_runner, At(5, kill), hook=hook)
    again = make_runner(resume=True)
    again.prepare()
    assert again.run.iter == 4
    assert find_latest_checkpoint(tmp_path / "run") == tmp_path / "run" / template.format(4)


def test_a_best_checkpoint_is_found_if_the_run_saves_no_other(make_runner: MakeRunner, tmp_path: Path):
    """A best checkpoint is resumed from if there is no other, as a single file and as a directory."""
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
    """Neither other weights in the directory nor files written by ``published_keys`` are resumed from."""
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
    # The retention policy does not remove them either.
    assert published.exists()


def test_published_files_of_older_versions_are_not_resumed_from(make_runner: MakeRunner, tmp_path: Path):
    """Files written by ``published_keys`` are not resumed from, although they contain the ID of the run."""
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
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_at_zero(
    make_runner: MakeRunner, tmp_path: Path, suffix: str, damaged: Callable[[bytes], bytes]
):
    """Resuming fails instead of starting at 0, which would overwrite checkpoints that might be repaired."""
    train(make_runner, iterations=4, hook={"filename_tmpl": f"e_{{}}{suffix}"})
    for number in (2, 4):
        path = tmp_path / "run" / f"e_{number}{suffix}"
        file = path if suffix else path / "manifest.json"
        file.write_bytes(damaged(file.read_bytes()))
    with pytest.raises(CheckpointDamagedError, match=r"None of the 2 checkpoints"):
        make_runner(resume=True).prepare()


def test_a_run_that_saves_to_another_directory_resumes_without_the_pointer(make_runner: MakeRunner, tmp_path: Path):
    """Checkpoints in ``out_dir`` are found if the pointer file is missing or out of date."""
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
        ("latest.pth", "gives every checkpoint the same name"),
        ("{epoch}.pth", "cannot be formatted with a number: KeyError"),
        ("{:q}", "cannot be formatted with a number: ValueError"),
        ("epochs/{}.pth", "contains a folder.*out_dir"),
        (".e_{}", "hidden names"),
    ],
)
def test_templates_that_could_not_be_found_again_are_rejected(template: str, text: str):
    """A file name template that could not be found again is rejected in the constructor."""
    with pytest.raises(ConfigValueError, match=text):
        CheckpointHook(filename_tmpl=template)
