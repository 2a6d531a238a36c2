"""Numbers that are not finite are seen at the step, and what was chosen is done."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spoiled import EPOCH, Spoil, spoiled_settings
from torch import nn
from toys import At, Recorder, loader

from stratagem import Runner
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.train import EMAHook, Hook, NonFiniteHook

ADAGRAD = {"optimizer": {"type": "Adagrad", "lr": 0.1, "fused": False, "foreach": True}}


@pytest.fixture
def spoiled(make_runner: Callable[..., Runner]) -> Callable[..., tuple[Runner, Recorder, Spoil]]:
    """Make a runner whose iterations of some numbers go bad."""

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
def test_the_run_stops_before_the_weights_are_spoiled(spoiled: Make, how: str, accumulated: int):
    """Whether the loss or only a gradient is not finite; the weights are those before the update."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": accumulated}
    runner, _, spoiler = spoiled({5: how}, optim_wrapper=optim)
    with pytest.raises(TrainingError) as stopped:
        runner.train()
    # With two micro-batches an update it is made after the sixth.
    assert f"{'Iteration 5' if accumulated == 1 else 'Iterations 5 to 6'} (epoch 1" in str(stopped.value)
    assert_equal(weights_of(runner), spoiler.weights[4])


def test_the_error_names_the_loss_the_samples_and_the_last_good_checkpoint(spoiled: Make, tmp_path: Path):
    """Enough to look at the batch: the samples are those that the iteration really had."""
    hooks = {"checkpoint": {"by_epoch": False, "interval": 2}}
    runner, recorder, _ = spoiled({5: "nan"}, hooks=hooks)
    with pytest.raises(TrainingError) as stopped:
        runner.train()
    message = str(stopped.value)
    assert "Iteration 5 (epoch 1, batch 5): the training step gave loss=nan on rank 0." in message
    assert f"rank 0 {list(recorder.rows[4][2])}" in message
    assert f"The last good checkpoint is {tmp_path / 'run' / 'iter_4'}." in message


def test_the_error_names_the_parameters_whose_gradients_are_bad(spoiled: Make):
    """Only that of the root is; those of the layers are sound."""
    runner, _, _ = spoiled({5: "gradient"})
    with pytest.raises(TrainingError, match=r"the gradients of 1 parameter\(s\) are not, from the loss on: root\."):
        runner.train()


def test_a_skipped_update_changes_nothing_and_schedules_wait(spoiled: Make):
    """Weights, momentum and the learning rate after the skip are those before it."""
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


def test_a_run_that_skips_nothing_has_the_bits_of_one_that_does_not_look(spoiled: Make):
    """Looking changes no number, whichever way it looks."""
    weights = []
    for hook in (None, {"check": "step"}, {"check": "interval"}):
        runner, _, _ = spoiled({}, hooks={"nonfinite": hook})
        runner.train()
        weights.append(weights_of(runner))
    assert_equal(weights[1], weights[0])
    assert_equal(weights[2], weights[0])


def test_so_many_skips_in_a_row_stop_the_run(spoiled: Make):
    """Three in a row with max_skips=3; two and two with a sound one between them do not."""
    hooks = {"nonfinite": {"policy": "skip", "max_skips": 3}}
    bad = {2: "nan", 3: "nan", 5: "nan", 6: "nan", 9: "nan", 10: "nan", 11: "nan"}
    runner, recorder, _ = spoiled(bad, hooks=hooks)
    with pytest.raises(TrainingError, match="Iteration 11 .* number 3 in a row, and max_skips=3"):
        runner.train()
    # The recorder comes before: it has seen the eleventh.
    assert len(recorder.rows) == 11


def test_the_number_of_skips_is_kept_in_checkpoints(spoiled: Make, make_runner: Callable[..., Runner], tmp_path: Path):
    """A run that goes on counts on."""
    hooks = {"nonfinite": {"policy": "skip"}, "checkpoint": {"interval": 1}}
    runner, _, _ = spoiled({2: "nan", 4: "nan"}, hooks=hooks, train_cfg={"max_epochs": 1})
    runner.train()
    arguments, _, _ = spoiled_settings({}, hooks={**hooks, "checkpoint": None}, resume=True)
    again = make_runner(**arguments)
    again.train()
    hook = next(hook for hook in again.run.events.hooks if isinstance(hook, NonFiniteHook))
    assert hook.state_dict() == {"skipped": 2}


def test_a_batch_that_reached_buffers_cannot_be_skipped(spoiled: Make):
    """The statistics of batch normalisation have its NaN, whatever the optimizer does."""

    class PoisonNorm(Hook):
        def before_train(self, run: Any) -> None:
            run.strategy.unwrap_model().layers[1] = nn.BatchNorm1d(8)

        def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
            if run.iter == 2:
                data_batch[0].fill_(float("nan"))

    runner, _, _ = spoiled({}, hooks={"nonfinite": {"policy": "skip"}}, custom_hooks=[PoisonNorm()])
    with pytest.raises(TrainingError, match="Iteration 3 .* layers.1.running_mean, layers.1.running_var"):
        runner.train()


def test_a_rolled_back_run_goes_on_from_the_checkpoint_behind_the_bad_batch(spoiled: Make):
    """The weights of iteration 4 train on the batches behind the sixth: those of the fifth and sixth are passed over."""
    hooks = {"nonfinite": {"policy": "rollback"}, "checkpoint": {"by_epoch": False, "interval": 4, "save_last": False}}
    bad = {6: "nan"}
    runner, recorder, _ = spoiled(bad, hooks=hooks, custom_hooks=[At(6, lambda run: bad.clear())])
    runner.train()
    places = [row[:2] for row in recorder.rows]
    assert places == [(0, batch) for batch in range(EPOCH)] + [(1, batch) for batch in range(EPOCH)]
    # Four sound iterations, and one and seven after going back; the fifth and the sixth do not count.
    assert runner.run.iter == runner.run.max_iters == 4 + 1 + EPOCH
    assert runner.run.optim_wrapper.num_steps_applied == 12


def test_a_roll_back_takes_up_what_the_checkpoint_has(spoiled: Make, tmp_path: Path):
    """The weights, the optimizer's momentum, and the average of the weights, as a new process would."""
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
    # Iterations are counted from the checkpoint's on, so the fifth was made twice.
    assert len(seen) == 2
    assert len(seen[0]) > 10
    assert_equal(seen[1], seen[0])


def test_a_roll_back_over_an_epoch_moves_schedules_by_epoch_along(spoiled: Make):
    """The second epoch has the second epoch's learning rate, though the checkpoint is of the first."""
    hooks = {"nonfinite": {"policy": "rollback"}, "checkpoint": {"by_epoch": False, "interval": 5, "save_last": False}}
    bad = {9: "nan"}
    schedule = {"type": "StepLR", "step_size": 1, "gamma": 0.5}
    runner, recorder, _ = spoiled(
        bad, hooks=hooks, param_scheduler=schedule, custom_hooks=[At(9, lambda run: bad.clear())]
    )
    runner.train()
    assert [row[:2] for row in recorder.rows[9:]] == [(1, batch) for batch in range(2, EPOCH)]
    assert recorder.rates == [0.1] * EPOCH + [0.05] * 7


def test_a_run_rolls_back_so_often_and_no_more(spoiled: Make):
    """A batch behind the bad one is bad as well, and so on."""
    hooks = {
        "nonfinite": {"policy": "rollback", "max_rollbacks": 2},
        "checkpoint": {"by_epoch": False, "interval": 2, "save_last": False},
    }
    runner, _, _ = spoiled({3: "nan"}, hooks=hooks)
    with pytest.raises(TrainingError, match="rolled back 2 times already, and max_rollbacks=2"):
        runner.train()


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(spoiled: Make):
    """The error says so."""
    runner, _, _ = spoiled({2: "nan"}, hooks={"nonfinite": {"policy": "rollback"}})
    with pytest.raises(TrainingError, match="no checkpoint to roll back to"):
        runner.train()


def test_at_intervals_fused_optimizers_keep_the_weights_as_they_were(spoiled: Make):
    """Nothing was read until the tenth iteration, and yet the third and all behind it have changed nothing."""
    hooks = {"nonfinite": {"check": "interval", "interval": 10}}
    runner, recorder, spoiler = spoiled({3: "nan"}, hooks=hooks)
    with pytest.raises(TrainingError, match="Iteration 3 .*loss=nan on rank 0.*the weights are those of before it"):
        runner.train()
    assert len(recorder.rows) == 10
    assert_equal(weights_of(runner), spoiler.weights[2])


def test_at_intervals_other_optimizers_have_spoiled_weights_and_the_error_says_so(spoiled: Make):
    """Such as one without a fused kernel."""
    hooks = {"nonfinite": {"check": "interval", "interval": 4}}
    runner, _, _ = spoiled({3: "nan"}, hooks=hooks, optim_wrapper=ADAGRAD)
    with pytest.raises(TrainingError, match="Iteration 3 .*the weights may hold it by now"):
        runner.train()
    assert not math.isfinite(weights_of(runner)["root"].item())


def test_at_intervals_a_look_comes_before_each_checkpoint(spoiled: Make, tmp_path: Path):
    """What was seen on the device is read before anything is saved, and at the end of the run."""
    hooks = {"nonfinite": {"check": "interval", "interval": 100}, "checkpoint": {"by_epoch": False, "interval": 5}}
    runner, _, _ = spoiled({8: "nan"}, hooks=hooks)
    with pytest.raises(TrainingError, match="Iteration 8 "):
        runner.train()
    assert runner.latest_checkpoint() == tmp_path / "run" / "iter_5"
    runner, _, _ = spoiled({8: "nan"}, hooks={"nonfinite": {"check": "interval", "interval": 100}})
    with pytest.raises(TrainingError, match="Iteration 8 "):
        runner.train()


def test_at_intervals_accumulated_windows_are_named_whole(spoiled: Make):
    """The update of the iterations 5 to 8 is bad; the looks at 6 and 12 fall inside of windows."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 4}
    runner, recorder, _ = spoiled(
        {6: "gradient"}, hooks={"nonfinite": {"check": "interval", "interval": 6}}, optim_wrapper=optim
    )
    with pytest.raises(TrainingError, match="Iterations 5 to 8 ") as stopped:
        runner.train()
    assert str([number for row in recorder.rows[4:8] for number in row[2]]) in str(stopped.value)


def test_the_log_keeps_what_is_not_finite(spoiled: Make):
    """As texts, since JSON has no NaN; the record says which samples it came from."""
    hooks = {"nonfinite": {"policy": "skip"}, "logger": {"interval": 2}}
    runner, recorder, _ = spoiled({4: "nan"}, hooks=hooks, train_cfg={"max_epochs": 1})
    runner.train()
    runner.close()
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (noted,) = [record for record in records if record.get("mode") == "nonfinite"]
    assert noted["loss"] == "NaN"
    assert (noted["iter"], noted["samples"]) == (4, {"0": list(recorder.rows[3][2])})
    logged = {record["step"]: record["loss"] for record in records if "mode" not in record}
    assert logged[4] == "NaN"
    assert math.isfinite(logged[2])
    assert math.isfinite(logged[6])


class Overflows(Hook):
    """Makes every loss scale overflow from some iteration on."""

    def __init__(self, first: int, last: int) -> None:
        self.between = range(first, last + 1)

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        run.strategy.unwrap_model().how = "nan" if run.iter + 1 in self.between else None


FP16 = {"type": "AmpOptimWrapper", "dtype": "float16", "optimizer": {"type": "SGD", "lr": 0.1}}


def test_float16_may_look_for_its_scale(spoiled: Make):
    """Twenty skips in a row are no error under any policy; twenty-five are."""
    cfg = {"train_cfg": {"max_epochs": 5}, "optim_wrapper": FP16}
    runner, recorder, _ = spoiled({}, custom_hooks=[Overflows(3, 22)], **cfg)
    runner.train()
    assert len(recorder.rows) == 5 * EPOCH
    assert runner.run.optim_wrapper.num_steps_applied == 5 * EPOCH - 20
    runner, recorder, _ = spoiled({}, custom_hooks=[Overflows(3, 50)], **cfg)
    with pytest.raises(TrainingError, match="Iteration 27 .*So were the 24 before it"):
        runner.train()


def test_a_wrapper_that_stops_by_itself_is_let(spoiled: Make):
    """optim_wrapper=dict(nonfinite="error") says so in its own words."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "nonfinite": "error"}
    runner, _, _ = spoiled({3: "nan"}, optim_wrapper=optim)
    with pytest.raises(TrainingError, match="The norm of the gradients is nan"):
        runner.train()


@pytest.mark.parametrize("clip_grad", [{"max_norm": 1.0}, {"type": "value", "clip_value": 1.0}])
def test_clipping_hides_nothing(spoiled: Make, clip_grad: dict[str, Any]):
    """Neither by norm, which is not finite itself, nor by value, which would make an infinity finite."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "clip_grad": clip_grad}
    runner, _, spoiler = spoiled({3: "gradient"}, optim_wrapper=optim)
    with pytest.raises(TrainingError, match="Iteration 3 "):
        runner.train()
    assert_equal(weights_of(runner), spoiler.weights[2])


def test_samples_of_a_loader_of_ones_own_are_said_not_to_be_known(spoiled: Make):
    """Its order is not ours to tell."""
    own = loader(batch_sampler=[[0, 1], [2, 3], [4, 5]])
    del own["batch_size"]
    runner, _, _ = spoiled({2: "nan"}, train_dataloader=own)
    with pytest.raises(TrainingError, match="Which samples these were is not known"):
        runner.train()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"policy": "stopp"}, "Did you mean 'stop'"),
        ({"check": "steps"}, "Did you mean 'step'"),
        ({"max_skips": 0}, "max_skips is 0"),
        ({"policy": "skip", "check": "interval"}, 'goes with check="step"'),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], text: str):
    """One sentence each."""
    with pytest.raises(ConfigValueError, match=text):
        NonFiniteHook(**arguments)
