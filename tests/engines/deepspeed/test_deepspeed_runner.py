"""Complete runs with the Runner, its hooks, and its loops, in which only the strategy changes."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from stratagem.checkpoint import SaveOrder, list_checkpoints
from stratagem.errors import StratagemError
from stratagem.trace import Part, Tolerances, compare, read_trace
from stratagem.train.hooks import TraceHook
from tests.engines.deepspeed.engine_runs import placed
from tests.support.ranks import Ranks

pytestmark = pytest.mark.deepspeed


class Points(torch.utils.data.Dataset[Any]):
    """64 points of four numbers in three classes; one of them may be NaN."""

    def __init__(self, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.points = torch.randn(64, 4, generator=generator)
        self.classes = (self.points.sum(1) > 0).long() + (self.points[:, 0] > 1).long()
        if poison is not None:
            self.points[poison] = torch.nan

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return self.points[index], self.classes[index]


def run(strategy: Mapping[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    """Train with a Runner, evaluate after each epoch, and return the logged values."""
    size = changes.pop("size", 2)
    poison = changes.pop("poison", None)
    loader = {
        "batch_size": 16 // size,
        "dataset": {"type": Points, "poison": poison},
        "collate_fn": {"type": "default_collate"},
    }
    config: dict[str, Any] = {
        "model": {
            "type": "SupervisedModel",
            "network": [
                {"type": "Linear", "in_features": 4, "out_features": 16},
                {"type": "ReLU"},
                {"type": "Linear", "in_features": 16, "out_features": 3},
            ],
            "loss": {"type": "CrossEntropyLoss"},
        },
        "train_dataloader": loader,
        "train_cfg": {"by_epoch": True, "max_epochs": 3},
        "val_dataloader": {**loader, "dataset": {"type": Points}},
        "val_cfg": {},
        "val_evaluator": {"type": "Accuracy", "task": "multiclass", "num_classes": 3},
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.05}, "clip_grad": {"max_norm": 1.0}},
        "param_scheduler": [{"type": "CosineAnnealingLR", "by_epoch": False}],
        "default_hooks": {"logger": {"interval": 1}},
        "log_level": "ERROR",
        "randomness": {"seed": 0},
        "work_dir": str(folder),
        "strategy": dict(strategy),
    }
    evaluates = changes.pop("evaluates", False)
    # Runs that start within the same second share a log directory.
    logged = len(logged_lines(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = Runner.from_cfg({**config, **changes})
        try:
            if evaluates == "predictions":
                results = runner.predict({"batch_size": 3, "dataset": torch.utils.data.Subset(Points(), range(13))})
                return {"results": results}
            if evaluates:
                return dict(runner.val())
            runner.train()
        finally:
            runner.run.close()
            runner.strategy.close()
    records = [json.loads(line) for line in logged_lines(folder)[logged:]]
    return {
        "losses": [record["loss"] for record in records if "loss" in record],
        "norms": [record["grad_norm"] for record in records if "grad_norm" in record],
        "accuracy": [record["accuracy"] for record in records if "accuracy" in record],
    }


def logged_lines(folder: Path) -> list[str]:
    """Return the logged lines of all starts of a run in order."""
    logs = sorted(folder.glob("*/vis_data/scalars.json"))
    return [line for log in logs for line in log.read_text().splitlines()]


def error_message(*args: Any, **kwargs: Any) -> str:
    """Return the type and message of the error that ends a run, so that the ranks stay alive."""
    try:
        run(*args, **kwargs)
    except StratagemError as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process."""
    return run(placed("single"), tmp_path_factory.mktemp("alone"), size=1)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_a_run_matches_a_single_process(two: Ranks, alone: dict[str, Any], folder: Path, name: str) -> None:
    """Losses, norms, and the metrics of each evaluation equal those of one process."""
    seen = two.run(run, placed(name), folder)[0]
    assert seen["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert seen["norms"] == pytest.approx(alone["norms"], rel=1e-3)
    assert seen["accuracy"] == pytest.approx(alone["accuracy"])


@pytest.mark.parametrize(("form", "name"), [("portable", "epoch_{}"), ("deepspeed", "epoch_{}"), ("deepspeed", "e={}")])
def test_a_run_resumes_from_its_latest_checkpoint(
    two: Ranks, four: Ranks, alone: dict[str, Any], folder: Path, form: str, name: str
) -> None:
    """resume=True finds the checkpoint in either format and with any name, and continues on other ranks and stages."""
    hooks = {"logger": {"interval": 1}, "checkpoint": {"async_save": False, "filename_tmpl": name}}
    two.run(
        run,
        placed("ZeRO-2", checkpoint_format=form),
        folder,
        train_cfg={"by_epoch": True, "max_epochs": 2},
        param_scheduler=[{"type": "CosineAnnealingLR", "by_epoch": False, "end": 12}],
        default_hooks=hooks,
    )
    seen = four.run(
        run,
        placed("ZeRO-3", checkpoint_format=form),
        folder,
        resume=True,
        size=4,
        param_scheduler=[{"type": "CosineAnnealingLR", "by_epoch": False, "end": 12}],
        default_hooks=hooks,
    )[0]
    assert len(seen["losses"]) == 4
    assert seen["losses"] == pytest.approx(alone["losses"][8:], rel=1e-3)
    orders = {each.path.name: each.order for each in list_checkpoints(folder)}
    assert orders == {
        name.format(epoch): SaveOrder(2 if epoch == 3 else 1, 1 if epoch == 3 else epoch) for epoch in (3, 2, 1)
    }


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_a_nonfinite_loss_stops_the_run(two: Ranks, folder: Path, name: str) -> None:
    """Every rank stops before the step with an error that names the iteration and the samples."""
    for message in two.run(error_message, placed(name), folder, poison=9):
        assert re.match(r"TrainingError: Iteration 3 .* returned loss=nan .* 9, .* The step was not applied", message)


def test_averaged_weights_match_a_single_process(two: Ranks, folder: Path) -> None:
    """The averaged weights with ZeRO 2 equal those of one process."""
    changes = {"custom_hooks": [{"type": "EMAHook", "momentum": 0.3}]}
    expected = run(placed("single"), folder / "a", size=1, **changes)
    seen = two.run(run, placed("ZeRO-2"), folder / "b", **changes)[0]
    assert seen["accuracy"] == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("options", [{"zero_optimization": {"stage": 3}}, {"bf16": True}])
def test_averaging_is_rejected_without_master_weights_in_the_model(
    two: Ranks, folder: Path, options: dict[str, Any]
) -> None:
    """EMAHook raises an error, because with ZeRO 3 or in 16 bits, the model does not contain the master weights."""
    messages = two.run(
        error_message, {"type": "DeepSpeedStrategy", **options}, folder, custom_hooks=[{"type": "EMAHook"}]
    )
    assert all("EMAHook needs the master weights in the model" in message for message in messages)


@pytest.mark.parametrize("options", [{"zero_optimization": {"stage": 3}}, {"bf16": True}])
def test_a_model_is_evaluated_without_an_optimizer(two: Ranks, folder: Path, options: dict[str, Any]) -> None:
    """`stratagem test` prepares only the model and gives the metrics of the last evaluation in training."""
    strategy = {"type": "DeepSpeedStrategy", **options}
    trained = two.run(run, strategy, folder)[0]
    seen = two.run(run, strategy, folder, load_from=str(folder / "epoch_3"), evaluates=True)[0]
    assert seen["accuracy"] == pytest.approx(trained["accuracy"][-1])


def test_learning_rates_are_scaled_with_the_batch_size(two: Ranks, folder: Path) -> None:
    """auto_scale_lr counts ranks and samples, as with every strategy."""
    changes = {"auto_scale_lr": {"enable": True, "base_batch_size": 32}}
    expected = run(placed("single"), folder / "a", size=1, **changes)
    seen = two.run(run, placed("ZeRO-1"), folder / "b", **changes)[0]
    assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ({"gradient_clipping": 2.0}, {}, r"gradient_clipping=2.0, but .*'max_norm': 1.0"),
        ({"gradient_accumulation_steps": 4}, {"counts": 2}, r"accumulation_steps=4, but .* accumulative_counts=2"),
        ({"train_micro_batch_size_per_gpu": 3}, {}, "yields 8 samples per rank"),
        ({"train_batch_size": 64}, {}, "8 samples x 1 accumulated x 2 ranks"),
        ({"zero_optimization": {"stage": 1}}, {"type": "Adafactor"}, "Adafactor cannot be used"),
        ({}, {"wrapper": "AmpOptimWrapper"}, r"DeepSpeedStrategy\(bf16"),
    ],
)
def test_contradicting_options_are_rejected(
    two: Ranks, folder: Path, strategy: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """An option that is given twice with different values raises an error that names both."""
    own = {"config": strategy} if "train_batch_size" in strategy else strategy
    optim = {
        "type": changes.get("wrapper", "DeepSpeedOptimWrapper"),
        "optimizer": {"type": changes.get("type", "AdamW"), "lr": 0.05},
        "clip_grad": {"max_norm": 1.0},
        "accumulative_counts": changes.get("counts", 1),
    }
    messages = two.run(error_message, {"type": "DeepSpeedStrategy", **own}, folder, optim_wrapper=optim)
    assert all(re.search(message, each) for each in messages), messages


def test_accumulation_and_clipping_in_a_deepspeed_file_are_used(two: Ranks, folder: Path) -> None:
    """The options can be given in the file alone; the last window of an epoch is shorter, as in one process."""
    optim = {"optimizer": {"type": "AdamW", "lr": 0.05}}
    wrapper = {**optim, "clip_grad": {"max_norm": 0.25}, "accumulative_counts": 3}
    changes = {"train_cfg": {"by_epoch": True, "max_epochs": 2}}
    expected = run(placed("single"), folder / "a", size=1, optim_wrapper=wrapper, **changes)
    file = folder / "ds_config.json"
    options = {"gradient_clipping": 0.25, "gradient_accumulation_steps": 3, "zero_optimization": {"stage": 2}}
    file.write_text(json.dumps(options), encoding="utf-8")
    strategy = {"type": "DeepSpeedStrategy", "config": str(file)}
    seen = two.run(run, strategy, folder / "b", optim_wrapper=optim, **changes)[0]
    assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-3)


def test_the_optimizer_section_of_deepspeed_is_used(two: Ranks, alone: dict[str, Any], folder: Path) -> None:
    """If optim_wrapper has no optimizer, the one of the DeepSpeed configuration is used."""
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.05}}, "zero_optimization": {"stage": 2}}
    seen = two.run(
        run,
        {"type": "DeepSpeedStrategy", "config": config},
        folder,
        optim_wrapper={"clip_grad": {"max_norm": 1.0}},
    )[0]
    assert seen["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def record_on_rank(folder: Path) -> None:
    """Record a run of each ZeRO stage on this rank."""
    for stage in (1, 2, 3):
        hooks = [TraceHook(folder / f"zero{stage}.json", steps=3)]
        run(placed(f"ZeRO-{stage}"), folder / f"work{stage}", custom_hooks=hooks)


@pytest.mark.slow
def test_traces_of_zero_equal_those_of_one_process(tmp_path: Path, ranks: Ranks) -> None:
    """Samples, losses, local gradients, learning rates and parameters are recorded; gradients inside of the engine are not."""
    run(placed("single"), tmp_path / "work", size=1, custom_hooks=[TraceHook(tmp_path / "one.json", steps=3)])
    # Importing the engine may take a minute on a busy machine.
    ranks.run_within(240, record_on_rank, tmp_path)
    for stage in (1, 2, 3):
        trace = read_trace(tmp_path / f"zero{stage}.json")
        result = compare(read_trace(tmp_path / "one.json"), trace, Tolerances(relative=1e-4, floor=1e-3))
        assert result.first is None, result.first
        assert set(result.sizes) == set(Part) - {Part.REDUCTION, Part.AVERAGE}
        assert set(trace.ranks[1].steps[0].absent) == {"reduced", "clipped"}


@pytest.mark.parametrize("name", ["ZeRO-2", "ZeRO-3"])
def test_predictions_equal_those_of_a_single_process(two: Ranks, folder: Path, name: str) -> None:
    """13 samples, which the ranks share unevenly, have the results of one process in the order of the data."""
    run(placed("single"), folder / "a", size=1)
    checkpoint = {"load_from": str(folder / "a" / "epoch_3"), "evaluates": "predictions"}
    expected = run(placed("single"), folder / "b", size=1, **checkpoint)["results"]
    first, second = two.run(run, placed(name), folder / "c", **checkpoint)
    assert second == {"results": None}
    assert [int(each["target"]) for each in first["results"]] == Points().classes[:13].tolist()
    torch.testing.assert_close(first["results"], expected)
