"""A run that is stopped at any point, in any way and any number of times gives the same results as an uninterrupted run."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stratagem.checkpoint import CheckpointLoader, flatten_tree
from tests.support.ranks import Ranks
from tests.support.small_runs import Lines, Mlp, make
from tests.train.drawn_runs import Drawn, Stop, differences, in_pieces, lines_of, trace_of, train, weights_of, whole

HOWS = ("SIGTERM", "hook", "model", "validation", "stop")


@st.composite
def drawn_runs(draw: Any) -> tuple[Drawn, list[Stop]]:
    """Draw a run and the points at which it is stopped."""
    by_epoch = draw(st.booleans())
    several = draw(st.booleans())
    drawn = Drawn(
        samples=draw(st.integers(5, 9)),
        by_epoch=by_epoch,
        length=draw(st.integers(1, 3) if by_epoch else st.integers(1, 12)),
        window=draw(st.integers(1, 4)),
        val_interval=draw(st.integers(1, 2) if by_epoch else st.integers(1, 5)),
        save_interval=draw(st.integers(1, 4)),
        keeps=draw(st.sampled_from([-1, 1, 2])),
        in_background=draw(st.booleans()),
        precision="float32" if several else draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        optimizer=draw(st.sampled_from(["SGD", "AdamW"])),
        average=draw(st.booleans()),
        several=several,
        weighted=not several and draw(st.booleans()),
        patience=draw(st.sampled_from([None, 1, 2])),
    )
    places = st.integers(1, drawn.iterations)
    return drawn, draw(st.lists(st.builds(Stop, places, st.sampled_from(HOWS)), min_size=1, max_size=4))


@pytest.mark.slow
@settings(max_examples=30)
@given(drawn_runs())
def test_a_stopped_run_equals_the_uninterrupted_run(case: tuple[Drawn, list[Stop]]) -> None:
    """Losses, samples, learning rates, metrics, and the final checkpoint are bit-identical."""
    drawn, stops = case
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        whole(drawn, one)
        in_pieces(drawn, other, stops)
        assert differences(one, other) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawn", "shorter"),
    [
        (Drawn(length=4, window=2, samples=8, average=True), [1, 3]),
        (Drawn(by_epoch=False, length=12, window=3, val_interval=3, patience=9), [6, 9]),
    ],
    ids=["epochs", "iterations"],
)
def test_a_finished_run_can_be_extended(tmp_path: Path, drawn: Drawn, shorter: list[int]) -> None:
    """A finished run that resumes with a larger ``max_epochs`` or ``max_iters`` equals a run of that length."""
    whole(drawn, tmp_path / "one")
    for length in [*shorter, drawn.length]:
        train(replace(drawn, length=length, save_interval=1), tmp_path / "other")
        assert len(lines_of(trace_of(tmp_path / "other"))) > length
    assert differences(tmp_path / "one", tmp_path / "other") == []


@pytest.mark.slow
def test_a_run_with_workers_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """Batches that two workers had prefetched when the run stopped do not affect later random numbers."""
    drawn = Drawn(workers=2, window=2, save_interval=3, precision="float16", average=True)
    whole(replace(drawn, workers=0), tmp_path / "one")
    in_pieces(drawn, tmp_path / "other", [Stop(5, "hook"), Stop(9, "SIGTERM"), Stop(14, "validation")])
    assert differences(tmp_path / "one", tmp_path / "other") == []


def in_processes(drawn: Drawn, folder: Path, stop: Stop | None, *, size: int) -> list[int | None]:
    """Train part of a run in new processes, one per rank, and return their exit codes."""
    # The fork server has imported the slow modules (tests.support.ranks), so each rank starts quickly; it does not train.
    context = multiprocessing.get_context("forkserver")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [context.Process(target=one_rank, args=(drawn, folder, stop, rank, size, port)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(60)
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def one_rank(drawn: Drawn, folder: Path, stop: Stop | None, rank: int, size: int, port: int) -> None:
    """Train as one rank of a run, or as its only process."""
    torch.set_num_threads(1)
    if size > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    train(drawn, folder, stop)


@pytest.mark.slow
def test_a_killed_run_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """Iterations after the last checkpoint run again with identical bits, also within an accumulation window."""
    drawn = Drawn(window=3, save_interval=2, precision="float16", average=True, weighted=True, patience=3, keeps=1)
    whole(drawn, tmp_path / "one")
    for stop in (Stop(1, "SIGKILL"), Stop(6, "SIGKILL"), Stop(8, "SIGKILL"), Stop(15, "SIGKILL")):
        assert in_processes(drawn, tmp_path / "other", stop, size=1) == [-signal.SIGKILL]
    train(drawn, tmp_path / "other")
    assert differences(tmp_path / "one", tmp_path / "other") == []
    again = [what for what, _ in lines_of(trace_of(tmp_path / "other"))]
    # The run was killed after iteration 6, before its checkpoint was saved, so it resumes from iteration 4. At
    # iteration 7 it had saved a best checkpoint.
    assert [again.count(f"iteration {number}") for number in range(5, 10)] == [2, 2, 1, 2, 1]


# The 13 samples are split into 7 and 7, so each of the two ranks has 4 batches of at most 2 per epoch.
ON_RANKS = [
    (
        Drawn(
            length=3,
            window=3,
            precision="float16",
            average=True,
            weighted=True,
            patience=2,
            in_background=True,
            keeps=1,
        ),
        [Stop(4, "stop"), Stop(6, "SIGTERM", rank=1), Stop(11, "model")],
    ),
    (
        Drawn(by_epoch=False, length=9, val_interval=2, several=True, save_interval=1),
        [Stop(2, "SIGTERM"), Stop(5, "stop")],
    ),
    (Drawn(by_epoch=False, length=11, window=4, optimizer="AdamW", val_interval=3), [Stop(2, "stop"), Stop(7, "stop")]),
]


def pieces_on_rank(cases: list[tuple[Drawn, list[Stop]]], folder: Path) -> None:
    """Train each run on this rank, once without a stop and once in parts."""
    for number, (drawn, stops) in enumerate(cases):
        with_ranks = replace(drawn, launcher="pytorch")
        whole(with_ranks, folder / f"{number}_one")
        in_pieces(with_ranks, folder / f"{number}_other", stops)


def test_stopped_ranks_equal_the_uninterrupted_run(ranks: Ranks, tmp_path: Path) -> None:
    """The losses, samples and final state of each rank are bit-identical; each rank restores its gradients of an open window."""
    ranks.run(pieces_on_rank, ON_RANKS, tmp_path)
    for number in range(len(ON_RANKS)):
        assert differences(tmp_path / f"{number}_one", tmp_path / f"{number}_other", ranks=2) == []


@pytest.mark.slow
def test_a_run_with_one_killed_rank_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """One rank is killed within an accumulation window, and the other one then exits."""
    drawn = Drawn(length=2, window=3, save_interval=2, average=True, launcher="pytorch")
    assert in_processes(replace(drawn, save_interval=-1), tmp_path / "one", None, size=2) == [0, 0]
    killed = in_processes(drawn, tmp_path / "other", Stop(5, "SIGKILL", rank=1), size=2)
    assert killed[1] == -signal.SIGKILL
    assert killed[0] not in (0, -signal.SIGKILL)
    assert in_processes(drawn, tmp_path / "other", None, size=2) == [0, 0]
    assert differences(tmp_path / "one", tmp_path / "other", ranks=2) == []


@pytest.mark.slow
def test_a_run_killed_before_its_first_epoch_resumes_from_a_checkpoint_by_time(tmp_path: Path) -> None:
    """Two ranks save together by time and keep only the newest; the resumed run equals the uninterrupted one."""
    drawn = Drawn(samples=37, length=1, minutes=1e-9, launcher="pytorch")
    assert in_processes(replace(drawn, minutes=None, save_interval=-1), tmp_path / "one", None, size=2) == [0, 0]
    assert in_processes(drawn, tmp_path / "other", Stop(8, "SIGKILL", rank=1), size=2)[1] == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "other").glob("*_*") if "iter" in path.name] == ["iter_7"]
    assert in_processes(drawn, tmp_path / "other", None, size=2) == [0, 0]
    assert differences(tmp_path / "one", tmp_path / "other", ranks=2) == []
    again = [what for what, _ in lines_of(trace_of(tmp_path / "other"))]
    assert [again.count(f"iteration {number}") for number in (7, 8, 9)] == [1, 2, 1]


# The global batch has 4 samples on any number of ranks, and each part ends within a window of 3.
MOVES = [(2, Stop(4, "stop")), (1, Stop(8, "stop")), (2, Stop(11, "stop")), (1, None)]


def moved(drawn: Drawn, folder: Path, size: int, stop: Stop | None) -> None:
    """Train part of a run on the given number of ranks."""
    train(replace(drawn, batch=4 // size, launcher="pytorch" if size > 1 else None), folder, stop)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_run_can_move_between_two_ranks_and_one_process(ranks: Ranks, tmp_path: Path, *, weighted: bool) -> None:
    """Each step has the same samples in the same order; losses and weights agree to 1e-5."""
    drawn = Drawn(
        samples=24, length=3, window=3, batch=4, draws=False, augmented=False, weighted=weighted, average=True
    )
    one, other = tmp_path / "one", tmp_path / "other"
    whole(drawn, one)
    steps: dict[str, list[Any]] = {}
    for size, stop in MOVES:
        before = [len(lines_of(trace_of(other, rank))) if trace_of(other, rank).exists() else 0 for rank in range(2)]
        if size == 1:
            moved(drawn, other, 1, stop)
        else:
            ranks.run(moved, drawn, other, 2, stop)
        pieces = [lines_of(trace_of(other, rank))[before[rank] :] for rank in range(size)]
        for (what, first), *others in zip(*pieces, strict=True):
            steps[what] = [first, *(values for _, values in others)]
    for what, expected in lines_of(trace_of(one)):
        if what.startswith("validation"):
            assert all(values == pytest.approx(expected, abs=1e-5) for values in steps[what])
            continue
        epoch, batch, samples, loss, *rates = expected
        shares = steps.pop(what)
        assert [share[:2] + share[4:] for share in shares] == [[epoch, batch, *rates]] * len(shares)
        assert [number for dealt in zip(*(share[2] for share in shares), strict=True) for number in dealt] == samples
        counts = [weights_of(torch.tensor(share[2])).sum().item() if weighted else 1 for share in shares]
        total = sum(float.fromhex(share[3]) * count for share, count in zip(shares, counts, strict=True))
        assert total / sum(counts) == pytest.approx(float.fromhex(loss), abs=1e-5)
    found, expected = (CheckpointLoader.load_checkpoint(folder / "final") for folder in (other, one))
    for part in ("state_dict", "optimizer", "average"):
        torch.testing.assert_close(tensors_of(found[part]), tensors_of(expected[part]), atol=1e-5, rtol=1e-5)


def tensors_of(part: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of one part of a checkpoint."""
    return flatten_tree(part)[0]


def resume_where_one_cannot_read(folder: Path, fault: str) -> tuple[int, list[str]]:
    """Resume on two ranks, of which the second cannot read the newest checkpoint; return the iteration and the log."""
    strategy = make("ddp", folder)
    lines = Lines(strategy)
    strategy.prepare(Mlp(), optim_wrapper={"optimizer": {"type": "AdamW"}})
    with pytest.MonkeyPatch.context() as patch:
        if strategy.rank == 1:
            newest = str(folder / "iter_3")
            open_file, exists = os.open, Path.exists

            def broken(path: Any, *args: Any, **kwargs: Any) -> int:
                if str(path).startswith(f"{newest}/model"):
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)
                return open_file(path, *args, **kwargs)

            if fault == "EIO":
                patch.setattr(os, "open", broken)
            else:
                patch.setattr(Path, "exists", lambda path: str(path) != newest and exists(path))
        rest = strategy.load_or_resume(resume=True)
    strategy.close()
    assert rest is not None
    return rest["meta"]["iter"], lines.lines


def save_three(folder: Path) -> None:
    """Save a checkpoint after one, two, and three iterations."""
    strategy = make("single", folder)
    strategy.prepare(Mlp(), optim_wrapper={"optimizer": {"type": "AdamW"}})
    for iteration in (1, 2, 3):
        strategy.save_checkpoint(folder / f"iter_{iteration}", extra_ckpt={"meta": {"iter": iteration}})
    strategy.close()


@pytest.mark.parametrize("fault", ["EIO", "not there"])
def test_all_ranks_fall_back_if_one_cannot_read_the_newest(ranks: Ranks, tmp_path: Path, fault: str) -> None:
    """If one rank cannot read the newest checkpoint, all ranks resume from the same older checkpoint and log the reason."""
    save_three(tmp_path)
    found = ranks.run(resume_where_one_cannot_read, tmp_path, fault)
    assert [iteration for iteration, _ in found] == [2, 2]
    (skipped,) = [line for line in found[0][1] if "Skipped checkpoint" in line]
    assert str(tmp_path / "iter_3") in skipped
    assert "Rank 1 failed" in skipped
