"""The precision of evaluations."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.errors import ConfigTypeError
from stratagem.model import BaseModel
from stratagem.train import BaseMetric
from tests.train.toys import QUIET_HOOKS, Samples, loader

MakeRunner = Callable[..., Runner]
AMP = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": {"type": "SGD", "lr": 0.1}}


class Linear(BaseModel):
    """A linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        """Return the loss, or the scores in nested containers."""
        scores = self.layer(inputs)
        return (
            {"loss": nn.functional.cross_entropy(scores, classes)} if mode == "loss" else {"all": [(scores, numbers)]}
        )


class Scores(BaseMetric):
    """The sum of all scores and their dtype."""

    def process(self, data_batch: Any, data_samples: Mapping[str, Any]) -> None:
        ((scores, numbers),) = data_samples["all"]
        assert numbers.dtype == torch.int64
        self.results.append((scores.numpy().sum(), str(scores.dtype)))

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"sum": float(sum(each[0] for each in results)), "dtypes": {each[1] for each in results}}


def validation(**cfg: Any) -> dict[str, Any]:
    """Return the configuration of a validation of five samples."""
    return {"val_dataloader": loader(5), "val_evaluator": Scores(), "val_cfg": cfg}


def expected(layer: nn.Module, *, autocast: bool) -> float:
    """Return the sum of the scores of five samples, computed by hand."""
    features = Samples(5).features
    total = 0.0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for batch in features.split(2):
            total += float(layer(batch).float().sum())
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "cfg", "autocast"),
    [
        (AMP, {}, True),
        (AMP, {"fp16": False}, False),
        ({"optimizer": AMP["optimizer"]}, {}, False),
        ({"optimizer": AMP["optimizer"]}, {"fp16": True}, True),
    ],
    ids=["as trained", "float32", "float32 as trained", "16 bits"],
)
def test_validation_has_the_precision_of_the_training(
    make_runner: MakeRunner, tmp_path: Path, optim: Any, cfg: Any, autocast: bool
):
    """A validation uses autocast if the training does, or as ``fp16`` specifies, and so does an evaluation of the checkpoint."""
    hooks = {**QUIET_HOOKS, "checkpoint": {"by_epoch": False, "interval": -1}}
    runner = make_runner(
        model=Linear(), optim_wrapper=optim, train_cfg={"max_iters": 3}, default_hooks=hooks, **validation(**cfg)
    )
    runner.train()
    metrics = runner.run.metrics
    assert metrics["dtypes"] == {"torch.float32"}
    layer = runner.strategy.unwrap_model().layer
    assert metrics["sum"] == pytest.approx(expected(layer, autocast=autocast), abs=1e-6)
    assert metrics["sum"] != pytest.approx(expected(layer, autocast=not autocast), abs=1e-6)
    alone = Runner(
        Linear(), tmp_path / "alone", load_from=tmp_path / "run" / "iter_3", log_level="ERROR", **validation(**cfg)
    )
    assert alone.val() == metrics
    alone.close()


@pytest.mark.slow
def test_averaged_weights_and_the_best_checkpoint_are_evaluated_under_autocast(make_runner: MakeRunner, tmp_path: Path):
    """The score of the best checkpoint is that of the averaged weights under autocast, and ``test`` repeats it bit for bit."""
    average = {"type": "EMAHook", "momentum": 0.5}
    best = {"by_epoch": False, "interval": 1, "save_best": "sum", "rule": "greater"}
    runner = make_runner(
        model=Linear(),
        optim_wrapper=AMP,
        train_cfg={"max_iters": 4, "val_interval": 1},
        default_hooks={**QUIET_HOOKS, "checkpoint": best},
        custom_hooks=[average],
        **validation(),
    )
    runner.train()
    (path,) = (tmp_path / "run").glob("best_*")
    layer = nn.Linear(4, 3)
    averages = CheckpointLoader.load_checkpoint(path)["average"]["averages"]
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in averages.items()})
    test = {key.replace("val_", "test_"): value for key, value in validation().items()}
    alone = Runner(
        Linear(), tmp_path / "alone", load_from=path, log_level="ERROR", custom_hooks=[average], **validation(), **test
    )
    scores = [alone.val()["sum"], alone.test()["sum"]]
    alone.close()
    assert scores[0] == scores[1] == pytest.approx(expected(layer, autocast=True), abs=1e-6)
    assert scores[0] != pytest.approx(expected(layer, autocast=False), abs=1e-6)


def test_fp16_must_be_a_bool(make_runner: MakeRunner):
    """Another value of ``fp16`` raises an error."""
    with pytest.raises(ConfigTypeError, match="fp16 must be True"):
        make_runner(model=Linear(), **validation(fp16="bfloat16")).train()
