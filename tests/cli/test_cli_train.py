import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Config, __version__
from stratagem.checkpoint import CheckpointLoader
from stratagem.cli.main import spell_out_resume

Command = Callable[..., Any]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state in a checkpoint."""
    return CheckpointLoader.load_checkpoint(path)["state_dict"]


@pytest.mark.slow
def test_training_ends_with_a_summary(stratagem: Command, config: str, tmp_path: Path):
    """The summary contains metrics, the checkpoint, and the commands to test it and to continue training."""
    done = stratagem("train", config, "--work-dir", "run")
    assert done.status == 0
    summary = done.out[done.out.index("Trained 2 epochs (10 iterations)") :].splitlines()
    rows = dict(line.strip().split(maxsplit=1) for line in summary[1:-1])
    assert 0 <= float(rows["accuracy"]) <= 1
    assert rows["checkpoint"] == "run/epoch_2"
    assert rows["test"] == f"stratagem test {config} run/epoch_2 --work-dir run"
    longer = "--set train_cfg.max_epochs=4 --set resume_param_scheduler=False"
    assert summary[-1] == f"  extend      stratagem train {config} {longer} --work-dir run --resume"
    assert (tmp_path / "run" / "toy_config.py").is_file()


@pytest.mark.slow
def test_the_work_dir_is_named_after_the_configuration(stratagem: Command, config: str, tmp_path: Path):
    """The default work dir is named after the configuration file."""
    assert stratagem("train", config, "--set", "train_cfg.max_epochs=1").status == 0
    assert (tmp_path / "work_dirs" / "toy_config" / "epoch_1").is_dir()


@pytest.mark.slow
def test_the_summary_of_one_epoch(stratagem: Command, config: str):
    """The summary uses the singular for one epoch, and the suggested command has no repeated option."""
    done = stratagem(
        "train", config, "--work-dir", "run", "--set", "train_cfg.max_epochs=1", "--set", "randomness.seed=4"
    )
    assert "Trained 1 epoch (5 iterations)" in done.out
    changes = "--set randomness.seed=4 --set train_cfg.max_epochs=2 --set resume_param_scheduler=False"
    again = f"stratagem train {config} {changes} --work-dir run --resume"
    assert done.out.rstrip().endswith(again)


@pytest.mark.slow
def test_a_run_of_max_steps_is_extended_by_max_steps(stratagem: Command, config: str):
    """The suggested command sets the key that the configuration uses; ``max_steps`` and ``max_iters`` exclude each other."""
    cfg = "train_cfg={_delete_: true, max_steps: 2}"
    done = stratagem("train", config, "--work-dir", "run", "--set", cfg)
    assert " --set train_cfg.max_steps=4 " in done.out
    assert "max_iters=" not in done.out


@pytest.mark.slow
def test_overrides_reach_mappings_and_items_of_lists(stratagem: Command, config: str, tmp_path: Path):
    """Overrides such as a.b.0.c=value are applied and are in the saved configuration."""
    overrides = ("model.network.1.p=0.0", "param_scheduler.0.end=3", "train_cfg={_delete_: true, max_iters: 2}")
    words = [word for override in overrides for word in ("--set", override)]
    assert stratagem("train", config, "--work-dir", "run", *words).status == 0
    kept = Config.fromfile(tmp_path / "run" / "toy_config.py")
    assert kept.model.network[1].p == 0.0
    assert kept.param_scheduler[0].end == 3
    assert kept.train_cfg.to_dict() == {"max_iters": 2}


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_matches_an_uninterrupted_one(stratagem: Command, config: str, tmp_path: Path):
    """Ctrl-C within an epoch exits with 130 and saves; the resumed run has the same final weights."""
    assert stratagem("train", config, "--work-dir", "whole").status == 0
    press = ("--set", "custom_hooks=[{type: PressCtrlC, after: 3}]")
    stopped = stratagem("train", config, "--work-dir", "cut", *press)
    assert stopped.status == 130
    assert "Interrupted after 3 of 10 iterations." in stopped.out
    assert " --work-dir cut --resume" in stopped.out.splitlines()[-1]
    rest = stratagem("train", config, "--work-dir", "cut", "--resume")
    assert rest.status == 0
    whole, cut = weights(tmp_path / "whole" / "epoch_2"), weights(tmp_path / "cut" / "epoch_2")
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_from_scratch(stratagem: Command, config: str):
    """--resume without an existing checkpoint starts from scratch, so the same command always works."""
    done = stratagem("train", config, "--work-dir", "run", "--resume")
    assert done.status == 0
    assert "Starting from scratch" in done.out + done.err


@pytest.mark.slow
def test_resume_accepts_a_path(stratagem: Command, config: str, tmp_path: Path):
    """--resume accepts the path of a checkpoint from any run."""
    stratagem("train", config, "--work-dir", "first", "--set", "train_cfg.max_epochs=1")
    done = stratagem("train", config, "--work-dir", "second", "--resume", "first/epoch_1")
    assert "Resumed after epoch 1, iteration 5" in done.out + done.err
    assert sorted(path.name for path in (tmp_path / "second").glob("epoch_*")) == ["epoch_2"]


@pytest.mark.slow
def test_test_prints_the_metrics_of_a_checkpoint(stratagem: Command, config: str, tmp_path: Path):
    """`test` prints the metrics measured in training and does not modify the saved configuration."""
    trained = stratagem("train", config, "--work-dir", "run")
    accuracy = next(line.split()[1] for line in trained.out.splitlines() if line.startswith("  accuracy"))
    kept = (tmp_path / "run" / "toy_config.py").read_bytes()
    tested = stratagem("test", config, "run/epoch_2", "--work-dir", "run")
    assert tested.status == 0
    assert tested.out.splitlines()[-1] == f"accuracy: {accuracy}"
    assert (tmp_path / "run" / "toy_config.py").read_bytes() == kept


@pytest.mark.slow
def test_predictions_are_printed_or_written(stratagem: Command, config: str, tmp_path: Path):
    """``predict`` prints a JSON object for each of 8 samples, or writes a file; a wrong suffix is an error before loading."""
    assert stratagem("train", config, "--work-dir", "run").status == 0
    printed = stratagem("predict", config, "run/epoch_2", "--work-dir", "run")
    assert printed.status == 0
    results = [json.loads(line) for line in printed.out.splitlines()]
    assert [len(each["preds"]) for each in results] == [4] * 8
    done = stratagem("predict", config, "run/epoch_2", "--work-dir", "run", "--out", "results.pt")
    assert "Saved the results to results.pt" in done.out
    assert [each["preds"].tolist() for each in torch.load(tmp_path / "results.pt")] == [
        each["preds"] for each in results
    ]
    wrong = stratagem("predict", config, "run/epoch_2", "--out", "results.txt")
    assert wrong.status == 2
    assert "must be .jsonl, .csv, .npz, .pt" in wrong.err


@pytest.mark.slow
def test_env_prints_the_environment(stratagem: Command):
    """`env` prints one line per fact."""
    done = stratagem("env")
    facts = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert done.status == 0
    assert facts["stratagem"] == __version__
    assert "PyTorch" in facts


@pytest.mark.slow
def test_version(stratagem: Command):
    """--version prints the name and version."""
    assert stratagem("--version").out == f"stratagem {__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ("train", "test", "env")),
        (
            ("train",),
            ("CONFIG", "--set", "--work-dir", "--resume", "--load-from", "--nproc", "--launcher", "--strategy"),
        ),
        (("test",), ("CONFIG", "CHECKPOINT", "--set", "--traceback")),
        (("predict",), ("CONFIG", "CHECKPOINT", "--out", "--nproc")),
        (("env",), ("bug reports",)),
    ],
)
def test_the_help_lists_all_options(stratagem: Command, command: tuple[str, ...], words: tuple[str, ...]):
    """The help of each command lists its options, and flags are shown without a value."""
    for option in ("--help", "-h"):
        done = stratagem(*command, option)
        assert done.status == 0
        assert all(word in done.out for word in words)
        assert "<bool>" not in done.out


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        ([], []),
        (["train"], ["train"]),
        (["train", "c.py", "--resume"], ["train", "c.py", "--resume=auto"]),
        (["--resume", "--set", "a=1"], ["--resume=auto", "--set", "a=1"]),
        (["--resume", "path"], ["--resume", "path"]),
        (["--resume=path"], ["--resume=path"]),
    ],
)
def test_the_path_of_resume_is_optional(words: list[str], spelled: list[str]):
    """The path of --resume is optional, at the end or before another option."""
    assert spell_out_resume(words) == spelled


@pytest.mark.slow
def test_a_dry_run_prints_a_summary_and_leaves_nothing(stratagem: Command, config: str, tmp_path: Path):
    """``train --dry-run`` tries all parts; the only files are those from before."""
    before = sorted(path.name for path in tmp_path.iterdir())
    done = stratagem("train", config, "--work-dir", "deep/run", "--dry-run")
    assert done.status == 0
    parts = [line.split("  ")[1] for line in done.out.splitlines()[1:]]
    assert parts == ["start-up", "training", "waiting for data", "validation", "saving", "test", "loading"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_dry_run_that_fails_has_an_exit_status(stratagem: Command, config: str, tmp_path: Path):
    """The error names the part, and nothing is left."""
    before = sorted(path.name for path in tmp_path.iterdir())
    hooks = ("--set", "default_hooks.checkpoint={save_best: acuracy, rule: greater}")
    done = stratagem("train", config, "--dry-run", *hooks)
    assert done.status == 2
    assert "Did you mean 'accuracy'?" in done.err
    assert "The dry run failed in this part: validation." in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_limits_are_set_on_the_command_line(stratagem: Command, config: str):
    """``--set`` limits the batches of an epoch and of a validation."""
    limits = ("--set", "limit_train_batches=0.4", "--set", "limit_val_batches=1")
    done = stratagem("train", config, "--work-dir", "run", *limits)
    assert "Trained 2 epochs (4 iterations)" in done.out
    assert "limited to 1 of 2 batches per rank (limit_val_batches=1)" in done.err
