"""A learning rate and a batch size are found without a trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def test_a_sweep_shows_the_loss_and_suggests_rates(stratagem: Command, config: str, tmp_path: Path):
    """Drawn over the rates, with a table; no run folder is made."""
    done = stratagem("find", "lr", config, "--steps", "30", "--min", "1e-5", "--max", "1")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == f"{config}: learning-rate range test"
    assert lines[1].startswith("30 of 30 optimizer steps")
    assert any(line.startswith("loss  ● smoothed  ● each step  ● steepest descent") for line in lines)
    rows = lines[lines.index("Learning rates") + 1 :]
    assert [row.split("  ")[1] for row in rows[:3]] == ["least loss", "steepest descent", "a decade below the minimum"]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_leaves_an_earlier_run_as_it_was(stratagem: Command, config: str, tmp_path: Path):
    """Whether the folder is named by work_dir or by the strategy's section."""
    assert stratagem("train", config, "--work-dir", "run", "--set", "train_cfg.max_epochs=1").status == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for key in ("work_dir=run", "strategy={type: SingleDeviceStrategy, work_dir: run}"):
        assert stratagem("find", "lr", config, "--steps", "5", "--set", key, "--set", "resume=True").status == 0
        assert stratagem("find", "batch", config, "--max-batch", "2", "--set", key).status == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_rates_that_are_all_too_large_suggest_nothing(stratagem: Command, config: str):
    """The sentence says what to try."""
    done = stratagem("find", "lr", config, "--steps", "12", "--min", "100", "--max", "1e6")
    assert done.status == 0, done.err
    assert "Try a smaller --min" in done.out
    assert "steepest" not in done.out


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--min", "1", "--max", "0.1"), ("low=1.0", "high=0.1", "0 < low < high")),
        (("--steps", "2"), ("steps=2", "at least 5")),
        (("--loss", "los"), ("'los'", "'loss'")),
        (("--optimizer", "generator"), ("one optimizer", "'generator'")),
        (("--set", "optim_wrapper.optimizer.rl=1"), ("AdamW", "'rl'")),
    ],
    ids=" ".join,
)
def test_a_sweep_that_cannot_be_made(stratagem: Command, config: str, words: tuple[str, ...], texts: tuple[str, ...]):
    """One clear message."""
    done = stratagem("find", "lr", config, *words)
    assert done.status == 2
    assert "Traceback" not in done.err
    for text in texts:
        assert text in done.err


def test_batches_are_timed_up_to_the_limit(stratagem: Command, config: str, tmp_path: Path):
    """A row for each size; on the CPU it says what cannot be found there."""
    done = stratagem("find", "batch", config, "--max-batch", "6", "--steps", "1")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if "ms/iteration" in line) + 1 :]
    assert [int(row.split()[0]) for row in table[:4]] == [1, 2, 4, 6]
    assert "Batches up to 6, the largest that was to be tried, fit." in done.out
    assert "On the CPU the largest batch cannot be found" in done.out
    assert "The knee is at" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_drawings_are_written_where_asked(stratagem: Command, config: str, tmp_path: Path):
    """One PNG each."""
    pytest.importorskip("matplotlib")
    assert stratagem("find", "lr", config, "--steps", "6", "--out", "lr.png").status == 0
    assert stratagem("find", "batch", config, "--max-batch", "2", "--out", "batch.png").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.png", "lr.png"]
