import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem import Runner
from stratagem.errors import ConfigValueError
from stratagem.train import LoggerHook
from tests.train.toys import QUIET_HOOKS, VALIDATION, At, EventLog, Toy

MakeRunner = Callable[..., Runner]


class Counting(Toy):
    """A model whose loss is the number of the iteration, counted from 1, and whose weights do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        self.count += 1
        optim_wrapper.update_params(self.layers[0].weight.sum() * 0)
        return {"loss": torch.tensor(float(self.count)), "text": "not a number"}


def run(make_runner: MakeRunner, logger: dict | None = None, **changes: Any) -> tuple[list[str], list[dict]]:
    """Train with the logger hook; return the log messages and the records."""
    # On an accelerator, values are checked only at the logging interval; on the CPU a check at every step is free.
    hooks = {**QUIET_HOOKS, "logger": {"interval": 4, **(logger or {})}, "nonfinite": {"check": "interval"}}
    changes = {"model": {"type": Counting}, "train_cfg": {"max_iters": 10}, **changes}
    runner = make_runner(default_hooks=hooks, log_level="INFO", **changes)
    runner.train()
    runner.close()
    lines = Path(runner.strategy.logger.log_file or next(Path(runner.strategy.log_dir).glob("*.log"))).read_text()
    messages = [line.split(" - INFO - ", 1)[1] for line in lines.splitlines() if " - INFO - " in line]
    records = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    parsed = [json.loads(record) for record in records]
    return messages, [record for record in parsed if record["mode"] != "goodput"]


def test_a_line_holds_the_means_since_the_previous_line(make_runner: MakeRunner):
    """Iterations 1 to 4 have a mean of 2.5 and 5 to 8 one of 6.5; the remaining iterations are not logged."""
    messages, records = run(make_runner)
    assert [re.sub(r"  eta.*host_memory_peak: [0-9]+", "", message) for message in messages if "loss" in message] == [
        "Iter(train) [ 4/10]  lr: 1.0000e-01  loss: 2.5000",
        "Iter(train) [ 8/10]  lr: 1.0000e-01  loss: 6.5000",
    ]
    assert [(record["iter"], record["loss"]) for record in records] == [(4, 2.5), (8, 6.5)]


@pytest.mark.parametrize(("size", "means"), [(2, [3.5, 7.5]), (6, [2.5, 5.5])])
def test_values_are_averaged_over_the_given_window(make_runner: MakeRunner, size: int, means: list):
    """At iteration 8, a window of 2 is (7 + 8) / 2 and a window of 6 is (3 + ... + 8) / 6."""
    _, records = run(make_runner, {"window_size": size})
    assert [record["loss"] for record in records] == means


def test_the_rest_of_an_epoch_can_have_a_line(make_runner: MakeRunner):
    """With ``ignore_last=False``, the last three of seven batches have a line with their mean of 6."""
    _, records = run(make_runner, {"ignore_last": False}, train_cfg={"max_epochs": 1})
    assert [(record["iter"], record["loss"]) for record in records] == [(4, 2.5), (7, 6.0)]


def test_a_record_holds_the_data_for_plots(make_runner: MakeRunner):
    """Each line is one JSON object with the current epoch and iteration, counted from 1."""
    _, records = run(make_runner, train_cfg={"max_epochs": 2})
    speed = {"time", "data_time", "samples_per_second", "steps_per_second", "host_memory", "host_memory_peak"}
    # The last key is missing without a memory limit.
    assert set(records[0]) - {"host_memory_used"} == {"lr", "loss", "mode", "epoch", "iter", "step"} | speed
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 4), (2, 8), (2, 12)]
    assert all(0 <= record["data_time"] <= record["time"] for record in records)


def test_an_evaluation_has_a_line_and_a_record(make_runner: MakeRunner):
    """The log line and the record of a validation contain the metrics and the position."""
    messages, records = run(make_runner, train_cfg={"max_epochs": 1}, **VALIDATION)
    (line,) = [message for message in messages if message.startswith("Epoch(val)")]
    assert re.fullmatch(r"Epoch\(val\) \[1\]\[3/3\]    accuracy: [01]\.\d{4}", line)
    assert {**records[-1], "accuracy": None} == {"accuracy": None, "mode": "val", "epoch": 1, "iter": 7, "step": 7}


def test_gradient_clipping_logs_the_gradient_norm(make_runner: MakeRunner):
    """The logged norm is that of the last step before clipping; without clipping, none is logged."""
    norms = []
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "clip_grad": {"max_norm": 1e-3}}
    remember = At(4, lambda run: norms.append(run.optim_wrapper.grad_norm.item()))
    messages, records = run(
        make_runner, model={"type": Toy}, optim_wrapper=optim, custom_hooks=[remember], train_cfg={"max_iters": 4}
    )
    assert records[0]["grad_norm"] == norms[0] > 1e-3
    assert f"grad_norm: {norms[0]:.4f}" in next(message for message in messages if "loss" in message)


def test_values_are_copied_from_the_device_only_for_a_line(make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch):
    """All values are copied from the device at once for each log line; no other iteration synchronizes with the device."""
    fetches: list[int] = []
    iteration = [0]
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            # Means over ranks and the sampler's order are on the host already.
            if self.dtype == torch.float32:
                fetches.append(iteration[0])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)

    class Clock(EventLog):
        def __getattribute__(self, name: str) -> Any:
            if name == "before_train_iter":
                return lambda run, *_: iteration.__setitem__(0, run.iter + 1)
            return object.__getattribute__(self, name)

        def get_triggered_stages(self) -> list[str]:
            return ["before_train_iter"]

    schedule = {"type": "CosineAnnealingLR", "by_epoch": False}
    run(make_runner, model={"type": Toy}, custom_hooks=[Clock()], param_scheduler=schedule)
    # Per line, the loss and whether gradients were finite are fetched; the latter is fetched once more at the end.
    assert fetches == [4, 4, 8, 8, 10]


def test_the_progress_bar_counts_every_iteration_and_ends_with_training(make_runner: MakeRunner):
    """The progress bar advances between two log lines too; a later validation does not show it again."""
    seen = []
    hooks = {**QUIET_HOOKS, "logger": {"interval": 4}}
    look = At(6, lambda run: seen.append(run.bar.completed))
    runner = make_runner(default_hooks=hooks, train_cfg={"max_epochs": 1}, custom_hooks=[look], **VALIDATION)
    runner.train()
    # The hook runs before the logger hook, so it sees the state after iteration 5.
    assert seen == [5]
    assert runner.run.bar is None
    runner.val()
    assert runner.run.bar is None


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"interval": -1}, {"window_size": 0}])
def test_an_interval_or_window_below_one_is_rejected(arguments: dict):
    """An interval or window below one is rejected, because no line would ever be written."""
    with pytest.raises(ConfigValueError, match=r"0|-1"):
        LoggerHook(**arguments)


def test_a_secret_is_not_in_the_environment_report(make_runner: MakeRunner, tmp_path: Path):
    """The report is often attached to bug reports, so passwords in its settings are masked."""
    address = "tcp://someone:geheim@127.0.0.1:29500"
    hooks = {"logger": None, "checkpoint": None}
    runner = make_runner(
        default_hooks=hooks, env_cfg={"dist_cfg": {"init_method": address}}, launcher="none", train_cfg={"max_iters": 1}
    )
    runner.train()
    text = (Path(runner.strategy.log_dir) / "environment.json").read_text()
    report = json.loads(text)
    assert "geheim" not in text
    assert report["runtime"]["Distributed launcher"] == "none"
    assert report["runtime"]["GPU number"] == "1"
    assert report["system"]["PyTorch"] == torch.__version__
