"""Finding a learning rate and a batch size leaves no files behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


@pytest.mark.slow
def test_a_sweep_plots_the_loss_and_suggests_rates(stratagem: Command, config: str, tmp_path: Path):
    """The loss is plotted over the learning rates, with a table of suggestions, and no run folder is created."""
    done = stratagem("find", "lr", config, "--steps", "30", "--min", "1e-5", "--max", "1")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == f"{config}: learning-rate range test"
    assert lines[1].startswith("30 of 30 optimizer steps")
    assert any(line.startswith("loss  ● smoothed  ● each step  ● steepest descent") for line in lines)
    rows = lines[lines.index("Learning rates") + 1 :]
    assert [row.split("  ")[1] for row in rows[:3]] == ["lowest loss", "steepest descent", "minimum / 10"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_does_not_modify_an_existing_run(stratagem: Command, config: str, tmp_path: Path):
    """An existing run folder is not modified, whether it is set by work_dir or in the strategy section."""
    assert stratagem("train", config, "--work-dir", "run", "--set", "train_cfg.max_epochs=1").status == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for key in ("work_dir=run", "strategy={type: SingleDeviceStrategy, work_dir: run}"):
        assert stratagem("find", "lr", config, "--steps", "5", "--set", key, "--set", "resume=True").status == 0
        assert stratagem("find", "batch", config, "--max-batch", "2", "--set", key).status == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_rates_that_are_too_large_give_no_suggestion(stratagem: Command, config: str):
    """If all learning rates are too large, the output suggests a smaller minimum."""
    done = stratagem("find", "lr", config, "--steps", "12", "--min", "100", "--max", "1e6")
    assert done.status == 0, done.err
    assert "Try a smaller --min" in done.out
    assert "steepest" not in done.out


@pytest.mark.slow
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
def test_an_invalid_sweep(stratagem: Command, config: str, words: tuple[str, ...], texts: tuple[str, ...]):
    """An impossible sweep raises an error without a traceback."""
    done = stratagem("find", "lr", config, *words)
    assert done.status == 2
    assert "Traceback" not in done.err
    for text in texts:
        assert text in done.err


def test_batch_sizes_are_measured_up_to_the_limit(stratagem: Command, config: str, tmp_path: Path):
    """The table has a row for each batch size, and on the CPU the output states that the largest size cannot be found."""
    done = stratagem("find", "batch", config, "--max-batch", "6", "--steps", "1")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if "ms/iteration" in line) + 1 :]
    assert [int(row.split()[0]) for row in table[:4]] == [1, 2, 4, 6]
    assert "All batch sizes up to the limit of 6 fit." in done.out
    assert "cannot be determined on the CPU" in done.out
    assert "The knee is at" in lines[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plots_are_written_on_request(stratagem: Command, config: str, tmp_path: Path):
    """`--out` writes one PNG per command."""
    pytest.importorskip("matplotlib")
    assert stratagem("find", "lr", config, "--steps", "6", "--out", "lr.png").status == 0
    assert stratagem("find", "batch", config, "--max-batch", "2", "--out", "batch.png").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.png", "lr.png"]
