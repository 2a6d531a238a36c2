"""Previewing the optimizer options of a run without training it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.train.tools.schedule_preview import RunPreview, preview_run
from tests.train.toys import Samples, Toy, loader

# 13 samples in batches of 2 are 7 iterations; 3 epochs are 21 iterations.
PARTS: Mapping[str, Any] = {
    "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 1.0, "momentum": 0.9}},
    "train_dataloader": loader(),
    "train_cfg": {"by_epoch": True, "max_epochs": 3},
}


def shown(**changes: Any) -> RunPreview:
    """Preview the small run with some arguments changed."""
    return preview_run(**{"model": {"type": Toy}, **PARTS, **changes})


def values(preview: RunPreview, key: str = "lr") -> np.ndarray:
    """Return the only curve of an option."""
    (course,) = (course for course in preview.courses if course.key == key)
    return course.values


def test_a_schedule_without_an_end_covers_the_whole_run():
    """A linear schedule without an end covers all 21 iterations; momentum stays constant."""
    preview = shown(param_scheduler={"type": "LinearLR", "start_factor": 0.5, "by_epoch": False})
    assert (preview.max_iters, preview.epoch_length) == (21, 7)
    np.testing.assert_array_equal(preview.iterations, np.arange(21))
    np.testing.assert_allclose(values(preview), 0.5 + 0.5 * np.arange(21) / 20)
    assert set(values(preview, "momentum")) == {0.9}


def test_epochs_are_converted_to_iterations():
    """A decay by 0.1 per epoch is shown every 7 iterations."""
    preview = shown(param_scheduler={"type": "StepLR", "step_size": 1, "gamma": 0.1})
    np.testing.assert_allclose(values(preview), np.repeat([1.0, 0.1, 0.01], 7))


def test_multiple_processes_share_the_samples():
    """13 samples on 2 ranks are 7 each, or 4 batches of 2; the learning rate scales to 4 samples instead of 16."""
    preview = shown(world_size=2, auto_scale_lr={"enable": True, "base_batch_size": 16, "rule": "sqrt"})
    assert (preview.epoch_length, preview.max_iters) == (4, 12)
    assert set(values(preview)) == {0.5}
    assert "by 0.5 (the square root of the ratio)" in preview.scaling[0]


def test_values_change_at_optimizer_steps():
    """With two micro-batches per optimizer step, each value lasts for two iterations."""
    preview = shown(
        optim_wrapper={**PARTS["optim_wrapper"], "accumulative_counts": 2},
        train_cfg={"max_iters": 6},
        param_scheduler={"type": "ExponentialLR", "gamma": 0.5, "by": "step"},
    )
    np.testing.assert_allclose(values(preview), [1.0, 1.0, 0.5, 0.5, 0.25, 0.25])
    assert preview.accumulative_counts == {"": 2}


def test_groups_with_equal_values_share_a_curve():
    """Biases have their own learning rate, but all parameters share one momentum curve."""
    optim = {**PARTS["optim_wrapper"], "paramwise_cfg": {"bias_lr_mult": 2.0}}
    preview = shown(optim_wrapper=optim)
    rates = {course.parameters: course.values[0] for course in preview.courses if course.key == "lr"}
    assert rates == {("layers.0.weight", "layers.3.weight"): 1.0, ("layers.0.bias", "layers.3.bias"): 2.0}
    (momentum,) = (course for course in preview.courses if course.key == "momentum")
    assert momentum.whole
    assert len(momentum.parameters) == 4
    assert not momentum.changes


def test_each_of_multiple_optimizers_is_shown():
    """Each optimizer is shown under its name with its own schedules."""
    optim = {
        "constructor": "MultiOptimWrapperConstructor",
        "first": {"optimizer": {"type": "SGD", "lr": 1.0}},
        "second": {"optimizer": {"type": "SGD", "lr": 0.5}},
    }

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)

    schedules = {"first": [], "second": {"type": "ConstantLR", "factor": 0.1}}
    preview = shown(model={"type": Two}, optim_wrapper=optim, param_scheduler=schedules)
    rates = {course.optimizer: course.values[0] for course in preview.courses if course.key == "lr"}
    assert rates == {"first": 1.0, "second": pytest.approx(0.05)}


def test_a_long_run_is_sampled_and_includes_the_ends_of_schedules():
    """A warmup of 3 iterations out of a million is still visible."""
    preview = shown(
        train_cfg={"max_iters": 10**6},
        param_scheduler={"type": "LinearLR", "start_factor": 0.5, "by_epoch": False, "end": 3},
    )
    assert len(preview.iterations) < 3000
    assert preview.iterations[-1] == 10**6 - 1
    assert {0, 1, 2, 3} <= set(preview.iterations)


def test_a_schedule_that_depends_on_metrics_is_listed():
    """A schedule that depends on metrics is listed, and its values are constant."""
    preview = shown(param_scheduler={"type": "ReduceOnPlateauLR"})
    assert preview.on_metrics == (("", "lr", "ReduceOnPlateauLR"),)
    assert set(values(preview)) == {1.0}


def test_nothing_is_allocated_and_no_random_number_is_drawn():
    """The model is built on the meta device, which takes no memory."""
    devices = []

    class Watched(Toy):
        def __init__(self) -> None:
            super().__init__()
            devices.append(next(self.parameters()).device.type)

    before = torch.get_rng_state()
    shown(model={"type": Watched})
    assert devices == ["meta"]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_reads_its_weights_is_built_on_the_cpu():
    """A model that reads its weights while it is built falls back to the CPU; the random state is restored."""

    class Looks(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.layers[0].weight[0, 0].item()

    before = torch.get_rng_state()
    assert len(values(shown(model={"type": Looks}))) == 21
    assert torch.equal(torch.get_rng_state(), before)


def test_schedules_by_epoch_in_a_run_by_iteration_are_rejected():
    """An epoch-based schedule in an iteration-based run raises the same error as in training."""
    with pytest.raises(ConfigValueError, match="counts epochs, but this run counts iterations"):
        shown(train_cfg={"max_iters": 9}, param_scheduler={"type": "StepLR", "step_size": 1, "end": 2})


def test_a_run_of_unknown_length_is_rejected():
    """A run in epochs over a stream without a length raises an error, because its number of iterations is unknown."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(Samples())

    with pytest.raises(ConfigValueError, match="Set max_iters in train_cfg"):
        shown(train_dataloader=loader(dataset=Stream()))


def test_a_built_optimizer_is_rejected():
    """A built optimizer is rejected, because its schedules would never be stepped."""
    with pytest.raises(ConfigTypeError, match="must be a configuration, got SGD"):
        shown(optim_wrapper=torch.optim.SGD(Toy().parameters(), lr=1.0))
