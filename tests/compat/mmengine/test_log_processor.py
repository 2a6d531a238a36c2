"""Lines of the log and records have MMEngine's format."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stratagem.compat.mmengine.logging import MessageHub
from stratagem.compat.mmengine.runner.log_processor import LogProcessor


def runner(name: str) -> Any:
    """A runner in iteration 12 of 40, in the third of 4 epochs of ten batches."""
    hub = MessageHub.get_instance(name)
    hub.update_scalar("train/lr", 0.01)
    for value in (4.0, 2.0):
        hub.update_scalar("train/loss", value)
    hub.update_scalar("train/time", 0.25)
    hub.update_scalar("train/data_time", 0.125)
    hub.update_info("eta", 7)
    hub.update_scalar("val/accuracy", 0.75)
    loader = SimpleNamespace(dataloader=range(10))
    return SimpleNamespace(
        message_hub=hub,
        epoch=2,
        iter=21,
        max_epochs=4,
        max_iters=40,
        train_loop=loader,
        val_loop=loader,
        _train_loop=loader,
    )


def test_a_line_of_the_training_by_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is aligned with the number of batches, and the loss is the mean of the window."""
    monkeypatch.setattr("stratagem.compat.mmengine.runner.log_processor.is_cuda_available", lambda: False)
    tag, line = LogProcessor().get_log_after_iter(runner("by-epoch"), 1, "train")
    assert line == (
        "Epoch(train) [3][ 2/10]  lr: 1.0000e-02  eta: 0:00:07  time: 0.2500  data_time: 0.1250  loss: 3.0000"
    )
    assert tag == {"lr": 0.01, "loss": 3.0, "time": 0.25, "data_time": 0.125, "epoch": 3, "iter": 22}


def test_a_line_of_the_training_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration is aligned with the length of the run, and with a hierarchy the names in the record have the mode."""
    monkeypatch.setattr("stratagem.compat.mmengine.runner.log_processor.is_cuda_available", lambda: False)
    processor = LogProcessor(by_epoch=False, log_with_hierarchy=True, num_digits=2)
    tag, line = processor.get_log_after_iter(runner("by-iteration"), 1, "train")
    assert line == "Iter(train) [22/40]  lr: 1.00e-02  eta: 0:00:07  time: 0.25  data_time: 0.12  loss: 3.00"
    assert tag["train/loss"] == 3.0
    assert tag["iter"] == 22


def test_a_statistic_of_the_configuration_replaces_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``log_name``, the maximum over all iterations takes the place of the mean of the window."""
    monkeypatch.setattr("stratagem.compat.mmengine.runner.log_processor.is_cuda_available", lambda: False)
    processor = LogProcessor(custom_cfg=[{"data_src": "loss", "method_name": "max", "window_size": "global"}])
    assert processor.get_log_after_iter(runner("custom"), 1, "train")[0]["loss"] == 4.0


def test_a_line_of_a_validation() -> None:
    """Results of a validation come with the number of finished epochs."""
    tag, line = LogProcessor().get_log_after_epoch(runner("validation"), 10, "val")
    assert line == "Epoch(val) [2][10/10]    accuracy: 0.7500"
    assert tag == {"accuracy": 0.75}


def test_two_statistics_with_one_name_are_refused() -> None:
    """One of them would be lost otherwise."""
    with pytest.raises(AssertionError, match="loss"):
        LogProcessor(custom_cfg=[{"data_src": "loss"}, {"data_src": "loss"}])
