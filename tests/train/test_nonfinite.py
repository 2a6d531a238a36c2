"""Non-finite values are detected at the step, and the configured policy is applied."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem import Runner
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.train import EMAHook, Hook, NonFiniteHook
from tests.train.spoiled import EPOCH, Spoil, spoiled_settings
from tests.train.toys import At, Recorder, loader

ADAGRAD = {"optimizer": {"type": "Adagrad", "lr": 0.1, "fused": False, "foreach": True}}


@pytest.fixture
def spoiled(make_runner: Callable[..., Runner]) -> Callable[..., tuple[Runner, Recorder, Spoil]]:
    """Return a function that builds a runner with non-finite values in the given iterations."""

    def make(spoil: dict[int, str], **options: Any) -> tuple[Runner, Recorder, Spoil]:
        arguments, recorder, spoiler = spoiled_settings(spoil, **options)
        return make_runner(**arguments), recorder, spoiler

    return make


Make = Callable[..., tuple[Runner, Recorder, Spoil]]


def weights_of(runner: Runner) -> dict[str, torch.Tensor]:
    return runner.strategy.model_state_dict()


def clone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_run_stops_before_the_weights_are_corrupted(spoiled: Make, how: str, accumulated: int):
    """The weights are those before the step, whether the loss or only a gradient is not finite."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": accumulated}
    runner, _, spoiler = spoiled({5: how}, optim_wrapper=optim)
    with pytest.raises(TrainingError) as stopped:
        runner.train()
    # With two micro-batches per step, the step follows the sixth iteration.
    assert f"{'Iteration 5' if accumulated == 1 else 'Iterations 5 to 6'} (epoch 1" in str(stopped.value)
    assert_equal(weights_of(runner), spoiler.weights[4])


def test_the_error_has_the_loss_the_samples_and_the_last_good_checkpoint(spoiled: Make, tmp_path: Path):
    """The listed samples are those of the failed iteration, so the batch can be inspected."""
    hooks = {"checkpoint": {"by_epoch": False, "interval": 2}}
    runner, recorder, _ = spoiled({5: "nan"}, hooks=hooks)
    with pytest.raises(TrainingError) as stopped:
        runner.train()
    message = str(stopped.value)
    assert "Iteration 5 (epoch 1, batch 5): the training step returned loss=nan on rank 0." in message
    assert f"rank 0 {list(recorder.rows[4][2])}" in message
    assert f"The last good checkpoint is {tmp_path / 'run' / 'iter_4'}." in message


def test_the_error_names_the_parameters_with_nonfinite_gradients(spoiled: Make):
    """The error names only the parameter whose gradient is NaN or Inf, here ``root``."""
    runner, _, _ = spoiled({5: "gradient"})
    with pytest.raises(TrainingError, match=r"the gradients of 1 parameter\(s\) contain NaN or Inf: root\."):
        runner.train()


def test_a_skipped_step_changes_nothing_and_schedules_wait(spoiled: Make):
    """A skipped step changes neither the weights nor the momentum nor the learning rate."""
    schedule = {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 10}
    runner, recorder, spoiler = spoiled(
        {3: "nan", 5: "gradient"}, hooks={"nonfinite": {"policy": "skip"}}, param_scheduler=schedule
    )
    runner.train()
    assert_equal(spoiler.weights[3], spoiler.weights[2])
    assert_equal(spoiler.weights[5], spoiler.weights[4])
    rates = recorder.rates
    assert (rates[2], rates[4]) == (rates[3], rates[5])
    assert runner.run.optim_wrapper.num_steps_applied == 2 * EPOCH - 2
    assert len(recorder.rows) == 2 * EPOCH


@pytest.mark.slow
def test_the_check_does_not_change_a_finite_run(spoiled: Make):
    """The check does not change any results, whether it runs at each step or at intervals."""
    weights = []
    for hook in (None, {"check": "step"}, {"check": "interval"}):
        runner, _, _ = spoiled({}, hooks={"nonfinite": hook})
        runner.train()
        weights.append(weights_of(runner))
    assert_equal(weights[1], weights[0])
    assert_equal(weights[2], weights[0])


def test_max_skips_in_a_row_stop_the_run(spoiled: Make):
    """Three skips in a row stop a run with ``max_skips=3``; two skips, a good step, and two skips do not."""
    hooks = {"nonfinite": {"policy": "skip", "max_skips": 3}}
    bad = {2: "nan", 3: "nan", 5: "nan", 6: "nan", 9: "nan", 10: "nan", 11: "nan"}
    runner, recorder, _ = spoiled(bad, hooks=hooks)
    with pytest.raises(TrainingError, match="Iteration 11 .* number 3 in a row, and max_skips=3"):
        runner.train()
    # The recorder runs before the check, so it has recorded the eleventh iteration.
    assert len(recorder.rows) == 11


@pytest.mark.slow
def test_the_number_of_skips_is_saved_in_checkpoints(spoiled: Make, make_runner: Callable[..., Runner], tmp_path: Path):
    """A resumed run continues to count the skips."""
    hooks = {"nonfinite": {"policy": "skip"}, "checkpoint": {"interval": 1}}
    runner, _, _ = spoiled({2: "nan", 4: "nan"}, hooks=hooks, train_cfg={"max_epochs": 1})
    runner.train()
    arguments, _, _ = spoiled_settings({}, hooks={**hooks, "checkpoint": None}, resume=True)
    again = make_runner(**arguments)
    again.train()
    hook = next(hook for hook in again.run.events.hooks if isinstance(hook, NonFiniteHook))
    assert hook.state_dict() == {"skipped": 2}


def test_a_batch_that_changed_buffers_cannot_be_skipped(spoiled: Make):
    """The running statistics of batch normalization already contain NaN, so skipping the step does not help."""

    class PoisonNorm(Hook):
        def before_train(self, run: Any) -> None:
            run.strategy.unwrap_model().layers[1] = nn.BatchNorm1d(8)

        def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
            if run.iter == 2:
                data_batch[0].fill_(float("nan"))

    runner, _, _ = spoiled({}, hooks={"nonfinite": {"policy": "skip"}}, custom_hooks=[PoisonNorm()])
    with pytest.raises(TrainingError, match="Iteration 3 .* layers.1.running_mean, layers.1.running_var"):
        runner.train()


@pytest.mark.slow
def test_a_rollback_continues_after_the_bad_batch(spoiled: Make):
    """Training continues from the weights of iteration 4 with the batch after the bad sixth one."""
    hooks = {"nonfinite": {"policy": "rollback"}, "checkpoint": {"by_epoch": False, "interval": 4, "save_last": False}}
    bad = {6: "nan"}
    runner, recorder, _ = spoiled(bad, hooks=hooks, custom_hooks=[At(6, lambda run: bad.clear())])
    runner.train()
    places = [row[:2] for row in recorder.rows]
    assert places == [(0, batch) for batch in range(EPOCH)] + [(1, batch) for batch in range(EPOCH)]
    # Four iterations, then one and seven after the rollback; the rolled back fifth and sixth do not count.
    assert runner.run.iter == runner.run.max_iters == 4 + 1 + EPOCH
    assert runner.run.optim_wrapper.num_steps_applied == 12


@pytest.mark.slow
def test_a_rollback_restores_everything_in_the_checkpoint(spoiled: Make, tmp_path: Path):
    """The rollback restores weights, momentum, and averaged weights, as a new process would."""
    hooks = {"nonfinite": {"policy": "rollback"}, "checkpoint": {"by_epoch": False, "interval": 4, "save_last": False}}
    bad = {6: "nan"}
    seen: list[dict[str, torch.Tensor]] = []

    class Look(Hook):
        def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
            if run.iter == 4:
                state = run.optim_wrapper.optimizer.state
                moments = {f"moment {n}": each["momentum_buffer"].clone() for n, each in enumerate(state.values())}
                average = {f"average {name}": value.clone() for name, value in ema.average.averages.items()}
                seen.append({**clone(weights_of(runner)), **moments, **average})

    ema = EMAHook(momentum=0.5)
    runner, _, _ = spoiled(bad, hooks=hooks, custom_hooks=[At(6, lambda run: bad.clear()), ema, Look()])
    runner.train()
    # Iterations are counted from the checkpoint on, so the fifth iteration ran twice.
    assert len(seen) == 2
    assert len(seen[0]) > 10
    assert_equal(seen[1], seen[0])


@pytest.mark.slow
def test_a_rollback_across_an_epoch_advances_schedules_by_epoch(spoiled: Make):
    """The second epoch uses its own learning rate, although the checkpoint is from the first epoch."""
    hooks = {"nonfinite": {"policy": "rollback"}, "checkpoint": {"by_epoch": False, "interval": 5, "save_last": False}}
    bad = {9: "nan"}
    schedule = {"type": "StepLR", "step_size": 1, "gamma": 0.5}
    runner, recorder, _ = spoiled(
        bad, hooks=hooks, param_scheduler=schedule, custom_hooks=[At(9, lambda run: bad.clear())]
    )
    runner.train()
    assert [row[:2] for row in recorder.rows[9:]] == [(1, batch) for batch in range(2, EPOCH)]
    assert recorder.rates == [0.1] * EPOCH + [0.05] * 7


@pytest.mark.slow
def test_a_run_stops_after_max_rollbacks(spoiled: Make):
    """The run stops after ``max_rollbacks`` rollbacks if the following batches contain NaN as well."""
    hooks = {
        "nonfinite": {"policy": "rollback", "max_rollbacks": 2},
        "checkpoint": {"by_epoch": False, "interval": 2, "save_last": False},
    }
    runner, _, _ = spoiled({3: "nan"}, hooks=hooks)
    with pytest.raises(TrainingError, match="already been rolled back 2 times, and max_rollbacks=2"):
        runner.train()


def test_a_rollback_without_a_checkpoint_is_an_error(spoiled: Make):
    """Without a checkpoint, ``policy="rollback"`` stops the run with an error."""
    runner, _, _ = spoiled({2: "nan"}, hooks={"nonfinite": {"policy": "rollback"}})
    with pytest.raises(TrainingError, match="no checkpoint to roll back to"):
        runner.train()


def test_interval_checks_keep_the_weights_of_fused_optimizers(spoiled: Make):
    """The result is read only after iteration 10, but no step has changed the weights since iteration 3."""
    hooks = {"nonfinite": {"check": "interval", "interval": 10}}
    runner, recorder, spoiler = spoiled({3: "nan"}, hooks=hooks)
    with pytest.raises(
        TrainingError, match="Iteration 3 .*loss=nan on rank 0.*the weights were not changed by this step"
    ):
        runner.train()
    assert len(recorder.rows) == 10
    assert_equal(weights_of(runner), spoiler.weights[2])


def test_interval_checks_report_corrupted_weights_of_other_optimizers(spoiled: Make):
    """Without a fused kernel, the step was already applied, and the error states that the weights may contain NaN."""
    hooks = {"nonfinite": {"check": "interval", "interval": 4}}
    runner, _, _ = spoiled({3: "nan"}, hooks=hooks, optim_wrapper=ADAGRAD)
    with pytest.raises(TrainingError, match="Iteration 3 .*the weights may already contain NaN or Inf"):
        runner.train()
    assert not math.isfinite(weights_of(runner)["root"].item())


def test_interval_checks_run_before_each_checkpoint(spoiled: Make, tmp_path: Path):
    """The result is read from the device before each save and at the end of the run."""
    hooks = {"nonfinite": {"check": "interval", "interval": 100}, "checkpoint": {"by_epoch": False, "interval": 5}}
    runner, _, _ = spoiled({8: "nan"}, hooks=hooks)
    with pytest.raises(TrainingError, match="Iteration 8 "):
        runner.train()
    assert runner.latest_checkpoint() == tmp_path / "run" / "iter_5"
    runner, _, _ = spoiled({8: "nan"}, hooks={"nonfinite": {"check": "interval", "interval": 100}})
    with pytest.raises(TrainingError, match="Iteration 8 "):
        runner.train()


def test_interval_checks_report_complete_accumulation_windows(spoiled: Make):
    """NaN in the step of iterations 5 to 8 is detected, although the checks after 6 and 12 are within accumulation windows."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 4}
    runner, recorder, _ = spoiled(
        {6: "gradient"}, hooks={"nonfinite": {"check": "interval", "interval": 6}}, optim_wrapper=optim
    )
    with pytest.raises(TrainingError, match="Iterations 5 to 8 ") as stopped:
        runner.train()
    assert str([number for row in recorder.rows[4:8] for number in row[2]]) in str(stopped.value)


def test_the_log_contains_nonfinite_values(spoiled: Make):
    """Non-finite values are logged as strings, because JSON has no NaN; the record lists the samples."""
    hooks = {"nonfinite": {"policy": "skip"}, "logger": {"interval": 2}}
    runner, recorder, _ = spoiled({4: "nan"}, hooks=hooks, train_cfg={"max_epochs": 1})
    runner.train()
    runner.close()
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (noted,) = [record for record in records if record.get("mode") == "nonfinite"]
    assert noted["loss"] == "NaN"
    assert (noted["iter"], noted["samples"]) == (4, {"0": list(recorder.rows[3][2])})
    logged = {record["step"]: record["loss"] for record in records if record["mode"] == "train"}
    assert logged[4] == "NaN"
    assert math.isfinite(logged[2])
    assert math.isfinite(logged[6])


class Overflows(Hook):
    """Makes every loss scale overflow in a range of iterations."""

    def __init__(self, first: int, last: int) -> None:
        self.between = range(first, last + 1)

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        run.strategy.unwrap_model().how = "nan" if run.iter + 1 in self.between else None


FP16 = {"type": "AmpOptimWrapper", "dtype": "float16", "optimizer": {"type": "SGD", "lr": 0.1}}


@pytest.mark.slow
def test_float16_can_search_for_its_loss_scale(spoiled: Make):
    """Twenty skips in a row are allowed under any policy; twenty-five raise an error."""
    cfg = {"train_cfg": {"max_epochs": 5}, "optim_wrapper": FP16}
    runner, recorder, _ = spoiled({}, custom_hooks=[Overflows(3, 22)], **cfg)
    runner.train()
    assert len(recorder.rows) == 5 * EPOCH
    assert runner.run.optim_wrapper.num_steps_applied == 5 * EPOCH - 20
    runner, recorder, _ = spoiled({}, custom_hooks=[Overflows(3, 50)], **cfg)
    with pytest.raises(TrainingError, match="Iteration 27 .*The 24 previous steps were not applied either"):
        runner.train()


def test_an_optimizer_wrapper_can_raise_the_error(spoiled: Make):
    """``optim_wrapper=dict(nonfinite="error")`` raises its own error."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "nonfinite": "error"}
    runner, _, _ = spoiled({3: "nan"}, optim_wrapper=optim)
    with pytest.raises(TrainingError, match="The norm of the gradients is nan"):
        runner.train()


@pytest.mark.parametrize("clip_grad", [{"max_norm": 1.0}, {"type": "value", "clip_value": 1.0}])
def test_clipping_does_not_hide_nonfinite_gradients(spoiled: Make, clip_grad: dict[str, Any]):
    """Clipping by norm or by value does not hide an infinite gradient from the check."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "clip_grad": clip_grad}
    runner, _, spoiler = spoiled({3: "gradient"}, optim_wrapper=optim)
    with pytest.raises(TrainingError, match="Iteration 3 "):
        runner.train()
    assert_equal(weights_of(runner), spoiler.weights[2])


def test_samples_of_a_custom_sampler_are_reported_as_unknown(spoiled: Make):
    """With a custom batch sampler, the error states that the samples are unknown."""
    own = loader(batch_sampler=[[0, 1], [2, 3], [4, 5]])
    del own["batch_size"]
    runner, _, _ = spoiled({2: "nan"}, train_dataloader=own)
    with pytest.raises(TrainingError, match="The samples are unknown"):
        runner.train()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"policy": "stopp"}, "Did you mean 'stop'"),
        ({"check": "steps"}, "Did you mean 'step'"),
        ({"max_skips": 0}, "expected max_skips to be an integer >= 1, got 0"),
        ({"policy": "skip", "check": "interval"}, 'needs check="step"'),
    ],
)
def test_invalid_arguments_are_rejected(arguments: dict[str, Any], text: str):
    """Invalid arguments raise an error that shows the value and the expected one."""
    with pytest.raises(ConfigValueError, match=text):
        NonFiniteHook(**arguments)
