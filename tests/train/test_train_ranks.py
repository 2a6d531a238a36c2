"""Tests of everything that must be the same on two ranks: logged values, metrics, and when to stop."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import new_group
from torchmetrics import MetricCollection, SumMetric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision
from torchmetrics.wrappers import MinMaxMetric

from stratagem import Runner
from stratagem.dist import get_rank
from stratagem.train import BaseMetric, Evaluator
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS, VALIDATION, At, Recorder, Toy, loader, settings, train_until_signal

# The 13 samples are split into 7 and 7, so each rank has 4 batches of at most 2 per epoch.
EPOCH = 4


class Numbers(BaseMetric):
    """Collects the sample numbers."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_samples["numbers"].tolist()

    def compute_metrics(self, results: list[int]) -> dict[str, Any]:
        return {"numbers": results}


def train(folder: str, **changes: Any) -> dict[str, Any]:
    """Train on this rank and return what was recorded."""
    recorder = Recorder()
    hooks = [recorder, *changes.pop("custom_hooks", ())]
    runner = Runner(**settings(work_dir=folder, strategy="DDPStrategy", custom_hooks=hooks, **changes))
    try:
        status = train_until_signal(runner)
        return {
            "status": status,
            "rows": recorder.rows,
            "metrics": recorder.metrics,
            "iter": runner.run.iter,
            "interrupted": runner.interrupted,
            "weights": {name: value.tolist() for name, value in runner.strategy.model_state_dict().items()},
        }
    finally:
        runner.close()


def train_with_signal(folder: str, *, rank: int, after: int, **changes: Any) -> dict[str, Any]:
    """Train, and send SIGTERM to only one rank after an iteration."""
    send = At(after, lambda run: os.kill(os.getpid(), signal.SIGTERM) if run.rank == rank else None)
    return train(folder, custom_hooks=[send], **changes)


def test_metrics_cover_all_ranks_in_the_order_of_the_samples(ranks: Ranks, tmp_path: Path):
    """Each of nine samples is counted once, and both ranks get the same metrics."""
    validation = {**VALIDATION, "val_dataloader": loader(9), "val_evaluator": Numbers()}
    first, second = ranks.run(train, str(tmp_path), train_cfg={"max_epochs": 1}, **validation)
    assert first["metrics"] == second["metrics"] == [(EPOCH, {"numbers": list(range(9))})]
    assert first["weights"] == second["weights"]


def test_logged_values_are_means_over_the_ranks(ranks: Ranks, tmp_path: Path):
    """Each rank computes the loss of its own samples, and the record holds the mean over both."""
    hooks = {**QUIET_HOOKS, "logger": {"interval": EPOCH}}
    found = ranks.run(train, str(tmp_path), train_cfg={"max_epochs": 1}, default_hooks=hooks)
    losses = [row[4] for rank in found for row in rank["rows"]]
    record = json.loads(next(tmp_path.rglob("scalars.json")).read_text().splitlines()[0])
    assert len(losses) == 2 * EPOCH
    assert abs(record["loss"] - sum(losses) / len(losses)) < 1e-6


class NamesByRank(Toy):
    """Logs a value under a name specific to this rank, and a further one in the fourth iteration."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        outputs = super().train_step(data, optim_wrapper)
        self.count = getattr(self, "count", 0) + 1
        name = ("mask", "box")[get_rank()]
        more = {"tokens": torch.tensor(2**24 + 1)} if self.count == 4 and get_rank() else {}
        return {**outputs, name: torch.tensor(1.0 + 2 * get_rank()), **more}


def test_ranks_can_log_values_of_different_names(ranks: Ranks, tmp_path: Path):
    """Each value is averaged over the ranks that logged it, and no rank waits for another."""
    hooks = {**QUIET_HOOKS, "logger": {"interval": 2}}
    model = {"type": NamesByRank}
    ranks.run(train, str(tmp_path), model=model, train_cfg={"max_epochs": 1}, default_hooks=hooks)
    lines = next(tmp_path.rglob("scalars.json")).read_text().splitlines()
    names = ("mask", "box", "tokens")
    records = [record for record in map(json.loads, lines) if record["mode"] == "train"]
    values = [{name: value for name, value in record.items() if name in names} for record in records]
    assert values == [{"mask": 1.0, "box": 3.0}, {"mask": 1.0, "box": 3.0, "tokens": 2.0**24 + 1}]


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_iteration(ranks: Ranks, tmp_path: Path):
    """A signal in the second iteration is known to all ranks after the third, and the run resumes exactly."""
    cfg = {"train_cfg": {"max_epochs": 4}, **VALIDATION}
    whole = ranks.run(train, str(tmp_path / "whole"), **cfg)
    stopped = ranks.run(train_with_signal, str(tmp_path / "cut"), rank=1, after=2, **cfg)
    assert [(rank["iter"], rank["interrupted"], rank["status"]) for rank in stopped] == [(3, signal.SIGTERM, 143)] * 2
    assert (tmp_path / "cut" / "iter_3").is_dir()
    rest = ranks.run(train, str(tmp_path / "cut"), resume=True, **cfg)
    for rank in (0, 1):
        assert stopped[rank]["rows"] + rest[rank]["rows"] == whole[rank]["rows"]
        assert rest[rank]["weights"] == whole[rank]["weights"]


def test_a_signal_that_arrives_too_late_lets_the_run_finish(ranks: Ranks, tmp_path: Path):
    """A signal in the last iteration lets training finish and skips only the last validation."""
    cfg = {"train_cfg": {"max_epochs": 3}, **VALIDATION}
    found = ranks.run(train_with_signal, str(tmp_path), rank=0, after=3 * EPOCH, **cfg)
    assert [(rank["iter"], rank["interrupted"], len(rank["metrics"])) for rank in found] == [
        (12, signal.SIGTERM, 2)
    ] * 2


def evaluate_on_rank_0() -> dict[str, Any]:
    """Evaluate a metric that collects lists; only rank 0 has a batch."""
    evaluator = Evaluator({"curve": BinaryAUROC()})
    if get_rank() == 0:
        evaluator.process(None, {"preds": torch.tensor([0.1, 0.4, 0.2, 0.9]), "target": torch.tensor([0, 0, 1, 1])})
    return evaluator.evaluate()


def test_a_rank_without_samples_takes_part_in_list_metrics(ranks: Ranks):
    """The metric equals that of one process: three of the four positive-negative pairs are in order."""
    assert ranks.run(evaluate_on_rank_0) == [{"curve": 0.75}] * 2


def evaluate_collection_on_rank_0() -> dict[str, Any]:
    """Evaluate a collection of metrics that collect lists; only rank 0 has a batch."""
    collection = MetricCollection({"area": BinaryAUROC(), "precision": BinaryAveragePrecision()})
    evaluator = Evaluator({"curve": collection})
    if get_rank() == 0:
        evaluator.process(None, {"preds": torch.tensor([0.1, 0.4, 0.2, 0.9]), "target": torch.tensor([0, 0, 1, 1])})
    return evaluator.evaluate()


def test_a_rank_without_samples_takes_part_in_a_metric_collection(ranks: Ranks):
    """The values equal those of one process: the precisions at the two positive samples are 1 and 2/3."""
    for values in ranks.run(evaluate_collection_on_rank_0):
        assert values == pytest.approx({"curve/area": 0.75, "curve/precision": 5 / 6})


def sums_of_one_rank() -> dict[str, Any]:
    """Return the sums of this rank's own number, in a collection and in a wrapper."""
    groups = [new_group([rank]) for rank in range(2)]
    evaluator = Evaluator({"all": MetricCollection({"sum": SumMetric()}), "wrapped": MinMaxMetric(SumMetric())})
    evaluator.process(None, (torch.tensor(float(get_rank() + 1)),))
    return evaluator.evaluate(group=groups[get_rank()])


def test_a_metric_collection_is_combined_over_the_given_ranks_only(ranks: Ranks):
    """With ranks that have copies of the same samples, metrics within a collection or wrapper do not count them twice."""
    assert [(values["all/sum"], values["wrapped/raw"]) for values in ranks.run(sums_of_one_rank)] == [(1, 1), (2, 2)]
