"""With ``--json``, commands print one JSON value and nothing else on the standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from stratagem.cli.app import app
from stratagem.cli.output import print_json

Command = Callable[..., Any]
# They train, print text that a model has generated, or write a file.
WITHOUT_RESULTS = {
    "train", "predict", "sample", "init", "submit", "report", "config show", "config port", "ckpt convert", "ckpt prune",
    "ckpt consolidate", "run-mmengine",
}  # fmt: skip


@pytest.fixture
def value(stratagem: Command) -> Callable[..., Any]:
    """Run a command with --json, and return what it prints."""

    def run(*words: Any, status: int = 0) -> Any:
        done = stratagem(*words, "--json")
        assert done.status == status, done.err
        return json.loads(done.out)

    return run


def _commands(command: Any, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    if not hasattr(command, "commands"):
        return {" ".join(prefix): command}
    found: dict[str, Any] = {}
    for name, inner in command.commands.items():
        found |= _commands(inner, (*prefix, name))
    return found


@pytest.mark.slow
def test_every_command_with_results_can_print_json():
    """All commands have --json, except those that train, generate text or write files."""
    commands = _commands(typer.main.get_command(app))
    without = {name for name, each in commands.items() if not any("--json" in option.opts for option in each.params)}
    assert without == WITHOUT_RESULTS


def test_the_environment_is_an_object(value: Callable[..., Any]):
    """`env --json` has a string for each property."""
    found = value("env")
    assert found["stratagem"]
    assert all(isinstance(each, str) for each in found.values())


@pytest.mark.slow
def test_the_changes_of_a_value_are_a_list(value: Callable[..., Any], config: str):
    """`config explain --json` has the place, the kind and the whole value of each change."""
    found = value("config", "explain", config, "train_cfg.max_epochs", "--set", "train_cfg.max_epochs=7")
    assert found["path"] == "train_cfg.max_epochs"
    assert [each["value"] for each in found["changes"]] == ["2", "7"]
    assert found["changes"][0]["where"].rpartition(":")[0].endswith("toy_config.py")


@pytest.mark.slow
def test_the_problems_of_a_configuration_are_a_list(value: Callable[..., Any], config: str):
    """`config check --json` lists the problems, with exit status 2 if there are any."""
    assert value("config", "check", config) == []
    (problem,) = value("config", "check", config, "--set", "modle=1", status=2)
    assert problem["path"] == "modle"
    assert "Did you mean 'model'" in problem["message"]


def test_the_differences_of_configurations_have_both_values(value: Callable[..., Any], tmp_path: Path):
    """`config diff --json` has the two values of each path."""
    for name, rate in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.py").write_text(f"first = dict(rate={rate})\nsecond = 3\n")
    assert value("config", "diff", "a.py", "b.py") == {"first.rate": {"first": "1", "second": "2"}}


@pytest.mark.slow
def test_the_values_of_a_schedule_are_lists(value: Callable[..., Any], config: str):
    """`schedule --json` has a value of each option for each iteration of the preview."""
    found = value("schedule", config)
    assert found["max_iters"] == 10
    (rates,) = [each for each in found["options"] if each["option"] == "lr"]
    assert len(rates["values"]) == len(found["iterations"])


@pytest.mark.slow
def test_the_measured_values_of_a_search_are_objects(value: Callable[..., Any], config: str):
    """`find lr --json` has the curve and the suggestions, and `find batch --json` the trials."""
    rates = value("find", "lr", config, "--steps", 5)
    assert len(rates["rates"]) == len(rates["losses"]) <= 5
    assert {"lowest_loss", "steepest_descent", "below_minimum", "diverged"} <= rates.keys()
    sizes = value("find", "batch", config, "--max-batch", 2)
    assert [trial["batch_size"] for trial in sizes["trials"]] == [1, 2]


@pytest.mark.slow
def test_the_metrics_and_intact_checkpoints_of_a_run(value: Callable[..., Any], stratagem: Command, config: str):
    """`test --json` has the metrics, and `ckpt verify --json` the result for each checkpoint."""
    assert stratagem("train", config, "--work-dir", "run").status == 0
    assert 0 <= value("test", config, "run/epoch_2")["accuracy"] <= 1
    found = {Path(each["checkpoint"]).name: each for each in value("ckpt", "verify", "run")}
    assert found["epoch_2"]["intact"]
    weights = next(Path("run/epoch_1").glob("model*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    found = {Path(each["checkpoint"]).name: each for each in value("ckpt", "verify", "run", status=1)}
    assert (found["epoch_1"]["intact"], found["epoch_2"]["intact"]) == (False, True)


def test_values_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]):
    """JSON has no NaN and Inf."""
    print_json({"a": [float("nan"), 1.0], "b": (float("inf"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": [None]}
