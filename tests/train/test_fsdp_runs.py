"""Complete runs with FSDPStrategy: training, uneven validation data, averaged weights, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import ConfigValueError
from stratagem.model import BaseModel
from stratagem.runner import Runner
from stratagem.train import BaseMetric
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS, Recorder, Samples, loader, settings

# Of 5 samples, one rank has 3 in batches of 2 and 1, and the other rank has 2 in one batch.
VALIDATION = 5


class Plain(BaseModel):
    """Two layers without random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        """Return the loss, or the predictions with the sample numbers."""
        scores = self.last(torch.tanh(self.first(inputs)))
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, classes), "weight": len(classes)}
        return {"preds": scores, "target": classes, "numbers": numbers}


class Seen(BaseMetric):
    """Returns which samples were evaluated and the sum of their highest scores."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Append the number and the highest score of each sample."""
        self.results += list(zip(data_samples["numbers"].tolist(), data_samples["preds"].amax(1).tolist(), strict=True))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return the two values."""
        numbers = [number for number, _ in results]
        return {"numbers": int("1" + "".join(map(str, numbers))), "scores": sum(score for _, score in results)}


def run(folder: str, strategy: Any, **changes: Any) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
    """Train for 3 epochs with averaged weights; return the validations, the losses, and the full model state."""
    size = 1 if strategy is None else 2 // strategy.get("tp", 1)
    recorder = Recorder()
    runner = Runner(
        **settings(
            model={"type": Plain},
            work_dir=folder,
            strategy=strategy,
            train_dataloader=loader(12, batch_size=4 // size),
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.02}, "clip_grad": {"max_norm": 0.5}},
            param_scheduler={"type": "CosineAnnealingLR", "by_epoch": True, "convert_to_iter_based": True},
            val_dataloader=loader(VALIDATION),
            val_cfg={},
            val_evaluator=[{"type": "Accuracy", "task": "multiclass", "num_classes": 3}, {"type": Seen}],
            default_hooks={**QUIET_HOOKS, "checkpoint": {"interval": 1}},
            custom_hooks=[recorder, {"type": "EMAHook", "momentum": 0.3}],
        )
        | changes
    )
    try:
        runner.train()
        model = runner.strategy.unwrap_model()
        state = {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
            for name, value in model.state_dict().items()
        }
        return [metrics for _, metrics in recorder.metrics], [row[4] for row in recorder.rows], state
    finally:
        runner.close()


FSDP = {"type": "FSDPStrategy", "wrap_policy": "Linear"}
TP = {"type": "FSDPStrategy", "tp": 2, "tp_plan": {"first": "colwise", "last": "rowwise"}}


@pytest.mark.parametrize("strategy", [FSDP, TP], ids=["FSDP", "TP"])
def test_a_run_validates_all_samples_once_with_averaged_weights(ranks: Ranks, tmp_path: Path, strategy: Any) -> None:
    """Padding batches of the rank with fewer samples do not count; metrics equal those of one process."""
    validations, losses, state = run(str(tmp_path / "single"), None)
    both = ranks.run(run, str(tmp_path / "ranks"), strategy)
    for rank in both:
        assert [each["seen/numbers"] if "seen/numbers" in each else each["numbers"] for each in rank[0]] == [101234] * 3
        for here, there in zip(rank[0], validations, strict=True):
            assert here == pytest.approx(there, abs=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(rank[2][name], value, atol=1e-5, rtol=1e-5)
    mean = [(first + second) / 2 for first, second in zip(both[0][1], both[1][1], strict=True)]
    assert mean == pytest.approx(losses, abs=1e-5)


def resume_after(folder: str, strategy: Any) -> Any:
    """Resume from the checkpoint that a single-process run saved after the second epoch."""
    return run(folder, strategy, resume=f"{folder}/epoch_2")


def test_a_sharded_run_resumes_from_a_single_process_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    """A run can resume under FSDP from a single-process checkpoint, including averaged weights, optimizer and schedule."""
    folder = str(tmp_path / "single")
    validations, losses, state = run(folder, None)
    both = ranks.run(resume_after, folder, FSDP)
    for rank in both:
        assert rank[0][-1] == pytest.approx(validations[-1], abs=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(rank[2][name], value, atol=1e-5, rtol=1e-5)
    mean = [(first + second) / 2 for first, second in zip(both[0][1], both[1][1], strict=True)]
    assert mean == pytest.approx(losses[-len(mean) :], abs=1e-5)


def rejected(folder: str) -> str:
    """Start a run with too few samples and return the error message."""
    try:
        run(folder, FSDP, train_dataloader=loader(1, batch_size=1))
    except ConfigValueError as error:
        return str(error)
    return "accepted"


def test_fewer_samples_than_ranks_are_rejected(ranks: Ranks, tmp_path: Path) -> None:
    """Fewer samples than ranks raise an error, because one rank would have no training data."""
    for error in ranks.run(rejected, str(tmp_path)):
        assert error.startswith("The training data has 1 samples for 2 data-parallel ranks.")
    assert len(Samples(1)) == 1
