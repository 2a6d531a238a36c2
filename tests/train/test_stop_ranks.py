"""A hook that requests to stop on one rank stops all ranks after the same iteration."""

from pathlib import Path
from typing import Any

import pytest

from stratagem.dist import get_rank
from stratagem.train import Hook
from tests.support.ranks import Ranks
from tests.train.test_train_ranks import EPOCH, train
from tests.train.toys import VALIDATION


class StopIn(Hook):
    """Requests to stop in the n-th call of an event, on some ranks."""

    def __init__(self, event: str, number: int, ranks: tuple[int, ...]) -> None:
        self.left, self.ranks = number, ranks
        setattr(self, event, self.count)
        self.event = event

    def get_triggered_stages(self) -> list[str]:
        return [self.event]

    def count(self, run: Any, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0 and get_rank() in self.ranks:
            run.progress.stop_training = True


def stop_in(folder: str, event: str, number: int, on: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """Train two epochs or more, with a request to stop."""
    return train(folder, custom_hooks=[StopIn(event, number, on)], **{**VALIDATION, **changes})


EPOCHS = {"max_epochs": 4}
ITERATIONS = {"max_iters": 4 * EPOCH, "val_interval": EPOCH}


@pytest.mark.parametrize("length", [EPOCHS, ITERATIONS], ids=["epochs", "iterations"])
@pytest.mark.parametrize(
    ("event", "number", "on", "end"),
    [
        # All ranks request it: the run stops at once, as before.
        ("after_train_iter", 2, (0, 1), 2),
        # One rank requests it: the others learn it in the next iteration.
        ("after_train_iter", 2, (0,), 3),
        ("after_train_iter", 2, (1,), 3),
        ("before_train_iter", 2, (1,), 3),
        # In the last iteration before a validation, the ranks agree at once.
        ("after_train_iter", EPOCH, (1,), EPOCH),
        ("after_val_iter", 1, (1,), EPOCH),
        ("after_val_epoch", 1, (1,), EPOCH),
        ("after_val_epoch", 1, (0, 1), EPOCH),
        ("before_train", 1, (0,), 0),
    ],
)
def test_a_request_to_stop_on_one_rank_stops_all_ranks(
    ranks: Ranks, tmp_path: Path, length: dict[str, int], event: str, number: int, on: tuple[int, ...], end: int
):
    """No rank waits for another, and all have the same position, weights and metrics."""
    found = ranks.run(stop_in, str(tmp_path), event, number, on, train_cfg=length)
    assert [each["iter"] for each in found] == [end, end]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert [each["status"] for each in found] == [None, None]


def test_a_request_to_stop_after_an_epoch_on_one_rank_stops_all_ranks(ranks: Ranks, tmp_path: Path):
    """The run validates the complete epoch and stops before the next."""
    found = ranks.run(stop_in, str(tmp_path), "after_train_epoch", 1, (1,), train_cfg=EPOCHS)
    assert [(each["iter"], len(each["metrics"])) for each in found] == [(EPOCH, 1)] * 2


class Diary(Hook):
    """Adds an entry to each checkpoint and has a state; both differ between ranks."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.loaded: Any = None

    def before_save_checkpoint(self, run: Any, checkpoint: dict[str, Any]) -> None:
        self.calls.append("before_save_checkpoint")
        checkpoint["diary"] = {"rank": run.rank}

    def after_load_checkpoint(self, run: Any, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["diary"]

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return {"rank": get_rank()}

    def load_state_dict(self, state_dict: Any) -> None:
        self.calls.append(f"load {state_dict['rank']}")


def save_and_resume(folder: str) -> tuple[list[str], Any]:
    """Train one epoch, then resume; return the calls of the first and the loaded values of the second session."""
    hooks = {"runtime_info": None, "logger": None}
    first, second = Diary(), Diary()
    train(folder, custom_hooks=[first], default_hooks=hooks, train_cfg={"max_epochs": 1})
    train(folder, custom_hooks=[second], default_hooks=hooks, train_cfg={"max_epochs": 2}, resume=True)
    return first.calls, (second.loaded, second.calls[0])


def test_hooks_save_on_every_rank_and_load_the_values_of_rank_0(ranks: Ranks, tmp_path: Path):
    """``state_dict`` and ``before_save_checkpoint`` can take part in collectives, since every rank calls them."""
    for calls, loaded in ranks.run(save_and_resume, str(tmp_path)):
        assert calls == ["state_dict", "before_save_checkpoint"]
        assert loaded == ({"rank": 0}, "load 0")
