import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.checkpoint.convert.convert import convert_checkpoint
from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError
from stratagem.model import BaseModel
from stratagem.train import EMAHook, Hook
from tests.strategies.test_synced_buffers import Trace
from tests.strategies.test_synced_buffers import data as synced_data
from tests.strategies.test_synced_buffers import runner as synced_runner
from tests.support.ranks import Ranks
from tests.support.small_runs import Lines
from tests.train.test_train_schedules import Poison
from tests.train.toys import EPOCH, QUIET_HOOKS, TEST, VALIDATION, At, Recorder, settings, train_until_signal

MakeRunner = Callable[..., Runner]
NAME = "layers.0.weight"
SAVING = {**QUIET_HOOKS, "checkpoint": {"by_epoch": False, "interval": 1}}


class Weights(Hook):
    """Records one weight after each step and during evaluations."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.trained: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []
        self.updates = 0

    def weight(self, run: Any) -> torch.Tensor:
        return run.strategy.unwrap_model().get_parameter(NAME).detach().clone()

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if run.optim_wrapper.num_steps_applied != self.updates:
            self.updates = run.optim_wrapper.num_steps_applied
            self.trained.append(self.weight(run))

    def _before_iter(self, run: Any, batch_idx: int, data_batch: Any = None, mode: str = "train") -> None:
        if mode != "train":
            self.evaluated.append(self.weight(run))


def exponential(weights: list[torch.Tensor], momentum: float) -> torch.Tensor:
    """Return the exponential moving average of the weights, computed step by step."""
    average = weights[0]
    for weight in weights[1:]:
        average = (1 - momentum) * average + momentum * weight
    return average


def interrupt(run: Any) -> None:
    """Send SIGINT, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def test_validation_uses_the_averaged_weights_and_training_does_not(make_runner: MakeRunner):
    """The model holds the averaged weights during a validation and only then."""
    weights, plain = Weights(), Recorder()
    hook, recorder = EMAHook(momentum=0.25), Recorder()
    make_runner(custom_hooks=[hook, weights, recorder], train_cfg={"max_epochs": 2}, **VALIDATION).train()
    make_runner(custom_hooks=[plain], train_cfg={"max_epochs": 2}, **VALIDATION).train()
    assert recorder.rows == plain.rows
    for epoch in (1, 2):
        seen = weights.evaluated[3 * (epoch - 1)]
        torch.testing.assert_close(seen, exponential(weights.trained[: EPOCH * epoch], 0.25))
    assert hook.average.steps == 2 * EPOCH


@pytest.mark.parametrize("ema_type", ["MomentumAnnealingEMA", {"type": "MomentumAnnealingEMA", "gamma": 2}])
def test_an_average_is_given_with_its_arguments(make_runner: MakeRunner, ema_type: Any):
    """The type is given as a name with arguments of the hook, or as a mapping."""
    given = {} if isinstance(ema_type, dict) else {"gamma": 2}
    runner = make_runner(custom_hooks=[{"type": "EMAHook", "ema_type": ema_type, "momentum": 0.3, **given}])
    runner.train()
    average = next(hook for hook in runner.run.events.hooks if isinstance(hook, EMAHook)).average
    assert (type(average).__name__, average.gamma, average.momentum) == ("MomentumAnnealingEMA", 2, 0.3)


def test_stochastic_weight_averaging_by_epoch_is_the_mean_of_the_epoch_ends(make_runner: MakeRunner):
    """With ``by_epoch``, the weights at the end of each epoch are averaged from ``begin_epoch`` on."""
    weights = Weights()
    hook = EMAHook("StochasticWeightAverage", by_epoch=True, begin_epoch=2)
    make_runner(custom_hooks=[hook, weights], train_cfg={"max_epochs": 4}).train()
    ends = [weights.trained[EPOCH * epoch - 1] for epoch in (2, 3, 4)]
    assert hook.average.steps == 3
    torch.testing.assert_close(hook.average.averages[NAME], torch.stack(ends).mean(0))


@pytest.mark.parametrize(("begin", "entered"), [({"begin_iter": 5}, 4), ({"begin_epoch": 2}, EPOCH)])
def test_averaging_can_start_late(make_runner: MakeRunner, begin: dict, entered: int):
    """Until averaging starts, a validation uses the training weights."""
    weights = Weights()
    hook = EMAHook(momentum=0.5, **begin)
    length = 8 if "begin_iter" in begin else 2 * EPOCH
    cfg = {"max_iters": length, "val_interval": 4} if "begin_iter" in begin else {"max_epochs": 2}
    make_runner(custom_hooks=[hook, weights], train_cfg=cfg, **VALIDATION).train()
    assert torch.equal(weights.evaluated[0], weights.trained[length // 2 - 1])
    torch.testing.assert_close(weights.evaluated[3], exponential(weights.trained[-entered:], 0.5))


def test_only_optimizer_steps_update_the_average(make_runner: MakeRunner):
    """With windows of two micro-batches and one skipped step, 4 of 10 iterations update the average."""
    hook = EMAHook()
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 2, "nonfinite": "skip"}
    runner = make_runner(custom_hooks=[hook, Poison(5)], optim_wrapper=optim, train_cfg={"max_iters": 10})
    runner.train()
    assert (runner.strategy.optim_wrapper.num_steps_attempted, hook.average.steps) == (5, 4)


def test_the_training_weights_are_restored_if_a_validation_fails(make_runner: MakeRunner):
    """After an error during validation, the model has the training weights again."""

    class Failing(Weights):
        def after_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            raise ZeroDivisionError

    weights, hook = Failing(), EMAHook(momentum=0.25)
    runner = make_runner(custom_hooks=[weights, hook], **VALIDATION)
    with pytest.raises(ZeroDivisionError):
        runner.train()
    assert not torch.equal(weights.evaluated[0], weights.trained[-1])
    assert torch.equal(runner.strategy.unwrap_model().get_parameter(NAME), weights.trained[-1])


@pytest.mark.slow
def test_a_checkpoint_has_the_weights_and_the_average_under_the_same_names(make_runner: MakeRunner, tmp_path: Path):
    """A checkpoint contains the training weights and the average, even if it is saved while the average is applied."""

    class SaveInside(Weights):
        def after_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            run.save_checkpoint(tmp_path / "inside", run.progress.here())

    weights = SaveInside()
    runner = make_runner(
        custom_hooks=[weights, EMAHook(momentum=0.25)], train_cfg={"max_epochs": 1}, default_hooks=SAVING, **VALIDATION
    )
    runner.train()
    names = [name for name, _ in runner.strategy.unwrap_model().named_parameters()]
    for saved in (tmp_path / "inside", tmp_path / "run" / "iter_7"):
        checkpoint = CheckpointLoader.load_checkpoint(saved, "cpu")
        assert list(checkpoint["average"]["averages"]) == names
        assert torch.equal(checkpoint["state_dict"][NAME], weights.trained[-1])
        torch.testing.assert_close(checkpoint["average"]["averages"][NAME], exponential(weights.trained, 0.25))


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(1,), (4,), (EPOCH,), (3, 10, 15)])
@pytest.mark.parametrize(
    "hook",
    [
        {"momentum": 0.1},
        {"momentum": 0.1, "begin_iter": 9, "interval": 2},
        {"ema_type": "StochasticWeightAverage", "by_epoch": True},
        {"ema_type": "MomentumAnnealingEMA", "gamma": 3, "update_buffers": True},
    ],
    ids=str,
)
def test_a_resumed_run_equals_the_uninterrupted_run(
    make_runner: MakeRunner, tmp_path: Path, hook: dict, stops: tuple[int, ...]
):
    """After a resume, the average, the metrics and the weights are bit-identical, even if the run stopped before averaging."""
    whole, seen = EMAHook(**hook), Recorder()
    make_runner(work_dir=tmp_path / "whole", custom_hooks=[whole, seen], **VALIDATION).train()
    metrics = Recorder()
    for iteration in stops:
        changes = [EMAHook(**hook), metrics, At(iteration, interrupt)]
        train_until_signal(make_runner(custom_hooks=changes, resume=True, **VALIDATION))
    pieces = EMAHook(**hook)
    make_runner(custom_hooks=[pieces, metrics], resume=True, **VALIDATION).train()
    assert metrics.metrics == seen.metrics
    assert pieces.average.steps == whole.average.steps
    for name, average in whole.average.averages.items():
        assert torch.equal(pieces.average.averages[name], average)


@pytest.mark.slow
def test_testing_a_checkpoint_uses_its_average(make_runner: MakeRunner, tmp_path: Path):
    """A loaded and a resumed checkpoint both use its average; training with ``load_from`` starts a new average."""
    hook = EMAHook(momentum=0.25)
    make_runner(custom_hooks=[hook], train_cfg={"max_epochs": 1}, default_hooks=SAVING).train()
    saved = tmp_path / "run" / "iter_7"
    for how in ({"load_from": saved}, {"resume": saved}):
        weights = Weights()
        runner = make_runner(work_dir=tmp_path / "test", custom_hooks=[EMAHook(), weights], **how, **TEST)
        runner.test()
        assert torch.equal(weights.evaluated[0], hook.average.averages[NAME])
    fresh = EMAHook(momentum=0.25)
    make_runner(custom_hooks=[fresh], load_from=saved, train_cfg={"max_iters": 3}).train()
    assert fresh.average.steps == 3


def test_a_checkpoint_without_an_average_can_be_tested(make_runner: MakeRunner, tmp_path: Path):
    """With a checkpoint without an average, an evaluation uses the weights in the checkpoint."""
    make_runner(train_cfg={"max_iters": 2}, default_hooks=SAVING).train()
    weights = Weights()
    runner = make_runner(
        work_dir=tmp_path / "test", custom_hooks=[EMAHook(), weights], load_from=tmp_path / "run" / "iter_2", **TEST
    )
    runner.test()
    assert torch.equal(weights.evaluated[0], runner.strategy.model_state_dict()[NAME])


@pytest.mark.slow
def test_resuming_without_an_average_is_an_error_unless_strict_load_is_false(make_runner: MakeRunner):
    """With ``strict_load=False`` a new average starts at the resumed iteration."""
    make_runner(train_cfg={"max_iters": 2}, default_hooks=SAVING).train()
    with pytest.raises(CheckpointMismatchError, match=r"contains no averaged weights.*strict_load=False"):
        make_runner(custom_hooks=[EMAHook()], resume=True, train_cfg={"max_iters": 5}).train()
    hook = EMAHook(strict_load=False)
    make_runner(custom_hooks=[hook], resume=True, train_cfg={"max_iters": 5}).train()
    assert hook.average.steps == 3


def test_a_second_call_of_train_keeps_the_average(make_runner: MakeRunner):
    """The second ``train()`` continues the average of the first."""
    hook, whole = EMAHook(momentum=0.25), EMAHook(momentum=0.25)
    runner = make_runner(custom_hooks=[hook, At(4, interrupt)])
    train_until_signal(runner)
    runner.train()
    make_runner(custom_hooks=[whole]).train()
    assert torch.equal(hook.average.averages[NAME], whole.average.averages[NAME])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin_iter": 3, "begin_epoch": 1}, "set only one"),
        ({"begin_iter": -1}, "expected begin_iter >= 0"),
    ],
)
def test_the_start_is_given_only_once(arguments: dict, message: str):
    """Setting both ``begin_iter`` and ``begin_epoch`` raises an error."""
    with pytest.raises(ConfigValueError, match=message):
        EMAHook(**arguments)


@pytest.mark.parametrize("arguments", [{"begin_epoch": 2}, {"by_epoch": True}])
def test_epochs_are_rejected_in_a_run_by_iteration(make_runner: MakeRunner, arguments: dict):
    """Epoch-based options of EMAHook raise an error in an iteration-based run."""
    with pytest.raises(ConfigValueError, match="this run counts iterations"):
        make_runner(custom_hooks=[EMAHook(**arguments)], train_cfg={"max_iters": 3}).train()


def test_two_averages_are_rejected(make_runner: MakeRunner):
    """Two EMAHooks raise an error, because a validation can use only one average."""
    with pytest.raises(ConfigValueError, match="several EMAHooks"):
        make_runner(custom_hooks=[EMAHook(), EMAHook()]).train()


def test_a_type_that_does_not_build_an_average_is_rejected(make_runner: MakeRunner):
    """A type that builds another object, such as a ``dict``, is rejected."""
    with pytest.raises(ConfigTypeError, match="made a dict, which is not an AveragedModel"):
        make_runner(custom_hooks=[EMAHook({"type": dict})]).train()


def test_the_average_does_not_exist_before_the_run():
    """Reading the average before the run raises an error, because it is created after the model is placed."""
    with pytest.raises(StateError, match="until the run starts"):
        EMAHook().average  # noqa: B018


def averaged(folder: str, resume: bool = False) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Train with DDP; return the average, one weight, and the recorded metrics."""
    hook, recorder = EMAHook(momentum=0.25, begin_iter=2), Recorder()
    stop = [] if resume else [At(10, interrupt)]
    runner = Runner(
        **settings(
            work_dir=folder, strategy="DDPStrategy", launcher="pytorch", custom_hooks=[hook, recorder, *stop],
            train_cfg={"max_iters": 14, "val_interval": 7}, resume=resume, **VALIDATION
        )
    )  # fmt: skip
    train_until_signal(runner)
    runner.close()
    return hook.average.averages[NAME], runner.strategy.model_state_dict()[NAME], recorder.metrics


def test_all_ranks_have_the_same_average_and_resume_it(ranks: Ranks, tmp_path: Path):
    """Each rank averages its own replica, and the averages are equal after a resume."""
    ranks.run(averaged, str(tmp_path))
    (average, weight, metrics), other = ranks.run(averaged, str(tmp_path), resume=True)
    assert torch.equal(average, other[0])
    assert torch.equal(weight, other[1])
    assert metrics == other[2]
    assert not torch.equal(average, weight)


STOCHASTIC = {"type": "EMAHook", "ema_type": "StochasticWeightAverage"}


@pytest.mark.slow
def test_resuming_another_type_of_average_is_an_error(make_runner: MakeRunner):
    """An exponential average is not continued as a stochastic one; with ``strict_load=False`` a new average starts."""
    make_runner(custom_hooks=[EMAHook(momentum=0.25)], train_cfg={"max_iters": 2}, default_hooks=SAVING).train()
    with pytest.raises(CheckpointMismatchError, match="type ExponentialMovingAverage"):
        make_runner(custom_hooks=[STOCHASTIC], resume=True, train_cfg={"max_iters": 5}).train()
    runner = make_runner(custom_hooks=[{**STOCHASTIC, "strict_load": False}], resume=True, train_cfg={"max_iters": 5})
    runner.train()
    hook = next(hook for hook in runner.run.events.hooks if isinstance(hook, EMAHook))
    assert hook.average.steps == 3


def test_resuming_with_another_momentum_is_reported(make_runner: MakeRunner):
    """The log names the options of the average that differ from the saved ones."""
    make_runner(custom_hooks=[EMAHook(momentum=0.25)], train_cfg={"max_iters": 2}, default_hooks=SAVING).train()
    runner = make_runner(
        custom_hooks=[EMAHook(momentum=0.5)], resume=True, train_cfg={"max_iters": 5}, log_level="INFO"
    )
    lines = Lines(runner.strategy)
    runner.train()
    assert "continues with those of this run: momentum=0.5 (saved: 0.25)" in lines.text


def test_evaluating_an_average_of_another_type_is_possible(make_runner: MakeRunner, tmp_path: Path):
    """An evaluation uses the saved average, and does not depend on how it would be continued."""
    hook, weights = EMAHook(momentum=0.25), Weights()
    make_runner(custom_hooks=[hook], train_cfg={"max_iters": 3}, default_hooks=SAVING).train()
    saved = tmp_path / "run" / "iter_3"
    make_runner(work_dir=tmp_path / "test", custom_hooks=[STOCHASTIC, weights], load_from=saved, **TEST).test()
    assert torch.equal(weights.evaluated[0], hook.average.averages[NAME])


def average_buffers(folder: str, source: str, resume: str | bool = False) -> Any:
    """Train a model with BatchNorm with DDP, and average its buffers; return the metrics and this rank's average."""
    hook, trace = EMAHook(momentum=0.25, update_buffers=True), Trace()
    runner = synced_runner(
        folder, {"type": "DDPStrategy", "buffers": source}, custom_hooks=[hook, trace], resume=resume,
        train_dataloader=synced_data(), train_cfg={"max_iters": 8, "val_interval": 4},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={**QUIET_HOOKS, "checkpoint": {"by_epoch": False, "interval": 4}},
    )  # fmt: skip
    runner.train()
    runner.close()
    return trace.metrics, {name: value.clone() for name, value in hook.average.averages.items()}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rank0", "mean"])
def test_averaged_buffers_of_several_ranks(ranks: Ranks, tmp_path: Path, source: str):
    """A validation uses synchronized averaged buffers, the checkpoint contains them, and each rank resumes its own."""
    whole = ranks.run(average_buffers, str(tmp_path), source)
    resumed = ranks.run(average_buffers, str(tmp_path / "resumed"), source, str(tmp_path / "iter_4"))
    for (metrics, averages), (later, others) in zip(whole, resumed, strict=True):
        assert metrics == whole[0][0]
        # The validation at the resumed iteration is repeated.
        assert later == metrics
        assert all(torch.equal(averages[name], others[name]) for name in averages)
    assert not torch.equal(whole[0][1]["body.0.0.running_mean"], whole[1][1]["body.0.0.running_mean"])
    alone = synced_runner(
        str(tmp_path / "alone"), None, custom_hooks=[EMAHook(update_buffers=True)], load_from=tmp_path / "iter_8"
    )
    assert alone.val()["meansquarederror"] == pytest.approx(whole[0][0][8], rel=1e-5)
    alone.close()


class TiedHalf(BaseModel):
    """A bfloat16 model with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        self.second = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        self.second.weight = self.first.weight

    def forward(self, inputs: torch.Tensor, classes: torch.Tensor, numbers: torch.Tensor, mode: str = "tensor") -> Any:
        scores = self.second(torch.tanh(self.first(inputs.bfloat16()))).float()[:, :3]
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, classes)}
        return {"preds": scores, "target": classes}


@pytest.mark.slow
def test_exports_of_the_best_checkpoint_contain_the_weights_that_scored(make_runner: MakeRunner, tmp_path: Path):
    """Converted and published files of a best checkpoint score as in the validation, also with tied bfloat16 weights."""
    evaluated: dict[int, dict[str, torch.Tensor]] = {}

    class Evaluated(Hook):
        def before_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
            state = run.strategy.unwrap_model().state_dict()
            evaluated[run.iter] = {name: value.clone() for name, value in state.items()}

    saving = {
        **QUIET_HOOKS,
        "checkpoint": {"interval": -1, "save_best": "accuracy", "rule": "greater", "published_keys": ["state_dict"]},
    }
    make_runner(
        model=TiedHalf(), custom_hooks=[EMAHook(momentum=0.25), Evaluated()], default_hooks=saving, **VALIDATION
    ).train()
    (best,) = [path for path in (tmp_path / "run").glob("best_*") if path.is_dir()]
    meta = CheckpointLoader.load_checkpoint(best, "cpu")["meta"]
    expected = evaluated[meta["iter"]]
    convert_checkpoint(best, tmp_path / "best.safetensors")
    (published,) = (tmp_path / "run").glob("best_*-*.pth")
    for weights in (load_file(tmp_path / "best.safetensors"), torch.load(published)["state_dict"]):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    convert_checkpoint(best, tmp_path / "raw.safetensors", raw=True)
    raw = load_file(tmp_path / "raw.safetensors")
    assert not torch.equal(raw["first.weight"], expected["first.weight"])


def test_evaluating_averaged_weights_without_the_hook_is_reported(make_runner: MakeRunner, tmp_path: Path):
    """An evaluation that does not use the average in a checkpoint logs a warning."""
    make_runner(custom_hooks=[EMAHook()], train_cfg={"max_iters": 2}, default_hooks=SAVING).train()
    runner = make_runner(work_dir=tmp_path / "test", load_from=tmp_path / "run" / "iter_2", log_level="WARNING", **TEST)
    lines = Lines(runner.strategy)
    runner.test()
    assert "This evaluation uses the trained weights" in lines.text
