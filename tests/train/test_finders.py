"""Finding a learning rate and a batch size without side effects."""

import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.errors import ConfigKeyError, ConfigValueError, PlacementError, TrainingError
from stratagem.model import BaseModel
from stratagem.train.tools import find_batch_size, find_learning_rate
from stratagem.train.tools.find_batch_size import _largest
from tests.train.toys import Samples, Toy, loader, settings

MakeRunner = Callable[..., Runner]


class Bowl(BaseModel):
    """A model whose loss is half the square of one weight, initially 1, regardless of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[int] = []

    def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
        self.seen.append(len(inputs))
        return {"loss": self.weight**2 / 2}


def prepared(make_runner: MakeRunner, **changes: Any) -> tuple[Any, Any]:
    """Return a prepared strategy and its data loader."""
    runner = make_runner(**changes)
    loop = runner.prepare()
    return runner.strategy, loop.dataloader


PLAIN = {"optimizer": {"type": "SGD", "lr": 0.5}}


def state(strategy: Any) -> dict[str, Any]:
    """Return all state that a search could change."""
    return copy.deepcopy(
        {
            "model": strategy.model.state_dict(),
            "optim": strategy.optim_wrapper.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1],
            "modes": [module.training for module in strategy.model.modules()],
            "gradients": [parameter.grad for parameter in strategy.model.parameters()],
        }
    )


def equal(one: Any, other: Any) -> bool:
    """Compare nested states bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, Tensor | np.ndarray):
        return bool((one == other).all())
    return bool(one == other)


# ---- the learning rate ------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_steps_with_increasing_rates(make_runner: MakeRunner):
    """With the loss w**2 / 2, a step of rate r multiplies w by 1 - r. The expected values are computed by hand."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=0.01, high=0.64, steps=7, smoothing=0.0)
    rates = [0.01 * 2**power for power in range(7)]
    weights = [1.0]
    for rate in rates[:-1]:
        weights.append(weights[-1] * (1 - rate))
    np.testing.assert_allclose(found.rates, rates)
    np.testing.assert_allclose(found.losses, np.square(weights) / 2, rtol=1e-5)
    np.testing.assert_allclose(found.smoothed, found.losses)
    assert not found.diverged


def test_the_suggestions_are_the_steepest_point_and_a_decade_below_the_minimum(make_runner: MakeRunner):
    """The loss still decreases at the end of the sweep, so its minimum is at the last rate."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=0.01, high=0.64, steps=7, smoothing=0.0)
    assert found.below_minimum == pytest.approx(0.064)
    # The slope at each rate is a difference of losses, because the rates are evenly spaced on a logarithmic scale.
    slopes = [found.losses[number + 1] - found.losses[number - 1] for number in range(1, 6)]
    assert found.steepest == pytest.approx(found.rates[1 + int(np.argmin(slopes))])


def test_it_stops_when_the_loss_diverges(make_runner: MakeRunner):
    """Rates above 2 make |1 - r| larger than 1; the divergence is detected a few steps later."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=1e-3, high=1e3, steps=60)
    assert found.diverged
    assert 2.0 < found.rates[-1] < 1e3
    assert found.least is not None
    assert 1.0 < found.least < 2.0 * 1.26**3


def test_a_loss_that_never_decreases_gives_no_suggestion(make_runner: MakeRunner):
    """If all rates are too large, nothing is suggested."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=3.0, high=30.0, steps=20)
    assert found.diverged
    assert (found.steepest, found.below_minimum) == (None, None)


def test_smoothing_does_not_move_a_minimum(make_runner: MakeRunner):
    """Smoothing does not move the minimum of a symmetric loss."""
    losses = iter(abs(number - 20.0) for number in range(41))

    class Valley(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            return {"loss": self.weight * 0 + next(losses)}

    strategy, data = prepared(make_runner, model={"type": Valley}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=1e-4, high=1.0, steps=41)
    assert found.smoothed.argmin() == 20


def test_a_sudden_increase_does_not_affect_earlier_losses(make_runner: MakeRunner):
    """A sudden increase does not affect the minimum before it."""
    losses = iter([*np.linspace(2.0, 1.0, 20), 1e6])

    class Explosion(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            return {"loss": self.weight * 0 + next(losses)}

    strategy, data = prepared(make_runner, model={"type": Explosion}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=1e-4, high=1.0, steps=21, smoothing=0.2)
    assert found.diverged
    assert found.least == pytest.approx(found.rates[18], rel=1.0)
    assert found.smoothed[-1] > 1e5


def test_groups_keep_their_ratios(make_runner: MakeRunner):
    """A parameter group with twice the learning rate keeps this ratio during the sweep."""
    strategy, data = prepared(
        make_runner, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}, "paramwise_cfg": {"bias_lr_mult": 2.0}}
    )
    used = []
    step = strategy.optim_wrapper.optimizer.step
    strategy.optim_wrapper.optimizer.step = lambda: (used.append(strategy.optim_wrapper.get_lr()["lr"]), step())
    find_learning_rate(strategy, data, low=1e-3, high=1e-1, steps=5)
    assert used[0] == pytest.approx([1e-3, 2e-3])
    assert used[-1] == pytest.approx([1e-1, 2e-1])


def test_each_rate_is_used_for_one_optimizer_step(make_runner: MakeRunner):
    """With 3 micro-batches per step, 5 rates take 15 iterations, even in a run of 9."""
    strategy, data = prepared(
        make_runner,
        model={"type": Bowl},
        optim_wrapper={**PLAIN, "accumulative_counts": 3},
        train_cfg={"max_iters": 9},
    )
    found = find_learning_rate(strategy, data, low=1e-3, high=1e-1, steps=5)
    assert len(found.losses) == 5
    assert len(strategy.model.seen) == 15


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_sweep_has_no_side_effects(make_runner: MakeRunner, optimizer: str):
    """A sweep restores all state bit for bit, so the training that follows is the same."""
    optim = {"optimizer": {"type": optimizer, "lr": 0.01}}
    losses = []
    for sweeps in (False, True):
        runner = make_runner(optim_wrapper=optim, model={"type": Toy})
        loop = runner.prepare()
        before = state(runner.strategy)
        if sweeps:
            find_learning_rate(runner.strategy, loop.dataloader, steps=12)
            assert equal(before, state(runner.strategy))
        runner.train()
        losses.append({key: value.clone() for key, value in runner.strategy.model.state_dict().items()})
    assert equal(*losses)


def test_a_failed_sweep_has_no_side_effects(make_runner: MakeRunner):
    """If a sweep fails, the error propagates, and all state is restored."""
    strategy, data = prepared(make_runner)
    before = state(strategy)
    with pytest.raises(ConfigKeyError, match=r"no 'los'.*'loss'"):
        find_learning_rate(strategy, data, loss="los")
    assert equal(before, state(strategy))


def test_a_rejected_update_ends_the_sweep(make_runner: MakeRunner):
    """With nonfinite='error', a rejected update ends the sweep."""
    optim = {**PLAIN, "nonfinite": "error"}

    class Cliff(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            self.seen.append(1)
            return {"loss": self.weight * (float("inf") if len(self.seen) > 8 else 1.0)}

    strategy, data = prepared(make_runner, model={"type": Cliff}, optim_wrapper=optim)
    found = find_learning_rate(strategy, data, low=1e-6, high=1e-5, steps=20)
    assert found.diverged
    assert len(found.losses) == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"low": 1.0, "high": 1.0}, "0 < low < high"),
        ({"low": 0.0}, "0 < low < high"),
        ({"steps": 2}, "at least 5"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"divergence": 1.0}, "divergence=1.0"),
    ],
)
def test_invalid_numbers_are_rejected(make_runner: MakeRunner, arguments: dict[str, Any], text: str):
    """The error for an invalid number shows it and the valid range."""
    strategy, data = prepared(make_runner)
    with pytest.raises(ConfigValueError, match=text):
        find_learning_rate(strategy, data, **arguments)


class Pair(BaseModel):
    """Two weights with separate optimizers, the second of which steps in every other iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)
        self.count = 0

    def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
        return inputs

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        self.count += 1
        loss = self.first(data[0]).square().mean()
        optim_wrapper["first"].update_params(loss)
        if self.count % 2 == 0:
            optim_wrapper["second"].update_params(self.second(data[0]).square().mean())
        return {"first_loss": loss}


PAIR = {
    "model": {"type": Pair},
    "optim_wrapper": {
        "constructor": "MultiOptimWrapperConstructor",
        "first": {"optimizer": {"type": "SGD", "lr": 0.1}},
        "second": {"optimizer": {"type": "SGD", "lr": 0.2}},
    },
}


def test_one_of_several_optimizers_can_be_swept(make_runner: MakeRunner):
    """The sweep of one of several optimizers only uses its steps; the other keeps its learning rate."""
    strategy, data = prepared(make_runner, **PAIR)
    used = set()
    step = strategy.optim_wrapper["first"].optimizer.step
    strategy.optim_wrapper["first"].optimizer.step = lambda: (
        used.add(strategy.optim_wrapper["first"].get_lr()["lr"][0]),
        step(),
    )
    found = find_learning_rate(strategy, data, optimizer="second", loss="first_loss", low=1e-3, high=1e-2, steps=5)
    assert len(found.losses) == 5
    assert strategy.model.count == 10
    assert used == {0.1}
    assert strategy.optim_wrapper.get_lr() == {"first.lr": [0.1], "second.lr": [0.2]}


def test_several_optimizers_require_a_name(make_runner: MakeRunner):
    """With several optimizers, the error for a missing name lists them."""
    strategy, data = prepared(make_runner, **PAIR)
    with pytest.raises(ConfigValueError, match="one of first, second"):
        find_learning_rate(strategy, data)
    with pytest.raises(ConfigKeyError, match="'third'"):
        find_learning_rate(strategy, data, optimizer="third")


def test_an_optimizer_that_is_never_stepped_is_an_error(make_runner: MakeRunner):
    """An optimizer that is never stepped raises an error instead of an endless loop."""

    class Lazy(Pair):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            return {"loss": torch.zeros(())}

    strategy, data = prepared(make_runner, **{**PAIR, "model": {"type": Lazy}})
    with pytest.raises(TrainingError, match="The optimizer was not stepped in 100 iterations"):
        find_learning_rate(strategy, data, optimizer="first")


def test_a_name_for_a_single_optimizer_is_rejected(make_runner: MakeRunner):
    """With a single optimizer, a name raises an error."""
    strategy, data = prepared(make_runner)
    with pytest.raises(ConfigKeyError, match="one optimizer"):
        find_learning_rate(strategy, data, optimizer="generator")


def test_a_loss_that_is_nan_from_the_start_is_an_error(make_runner: MakeRunner):
    """A NaN or Inf loss at the first rate raises an error."""

    class Broken(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            return {"loss": self.weight * float("nan")}

    strategy, data = prepared(make_runner, model={"type": Broken}, optim_wrapper=PLAIN)
    with pytest.raises(TrainingError, match="NaN or Inf at the smallest"):
        find_learning_rate(strategy, data)


# ---- the batch size ---------------------------------------------------------------------------------------------------


class Small(Bowl):
    """A model with memory for 11 samples."""

    def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
        if len(inputs) > 11:
            raise torch.OutOfMemoryError("no more")
        return super().forward(inputs, mode=mode)


@pytest.mark.parametrize("capacity", range(21))
def test_doubling_and_bisection_find_the_largest_size(capacity: int):
    """The largest size is found in few trials, for any capacity up to the limit of 20."""
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= capacity

    assert _largest(fits, 20) == capacity
    assert len(tried) == len(set(tried)) <= 10
    assert max(tried) <= 20


@pytest.mark.slow
def test_the_largest_batch_size_is_found(make_runner: MakeRunner):
    """The largest batch size is found from out-of-memory errors, and each trial has a time if it succeeded."""
    strategy, data = prepared(make_runner, model={"type": Small}, optim_wrapper=PLAIN, train_dataloader=loader(100))
    found = find_batch_size(strategy, data)
    assert found.largest == 11
    assert found.out_of_memory
    assert [trial.batch_size for trial in found.trials] == [1, 2, 4, 8, 10, 11, 12, 16]
    assert [trial.seconds is None for trial in found.trials] == [False] * 6 + [True] * 2
    assert found.knee in {1, 2, 4, 8, 10, 11}


def test_the_search_ends_at_the_limit_or_the_dataset(make_runner: MakeRunner):
    """The search ends at the limit, or at the size of the dataset, 13."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_batch_size(strategy, data)
    assert (found.largest, found.limit, found.out_of_memory) == (13, 13, False)
    assert find_batch_size(strategy, data, limit=3).largest == 3


@pytest.mark.slow
def test_no_batch_size_fits(make_runner: MakeRunner):
    """If not even one sample fits, there is no largest size and no knee."""

    class Full(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            raise MemoryError

    strategy, data = prepared(make_runner, model={"type": Full}, optim_wrapper=PLAIN)
    found = find_batch_size(strategy, data)
    assert (found.largest, found.knee) == (None, None)


def test_other_errors_are_not_treated_as_out_of_memory(make_runner: MakeRunner):
    """Other errors of the model propagate."""

    class Wrong(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            raise RuntimeError("shapes do not fit")

    strategy, data = prepared(make_runner, model={"type": Wrong}, optim_wrapper=PLAIN)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        find_batch_size(strategy, data)


def test_a_search_has_no_side_effects(make_runner: MakeRunner):
    """A search restores all state, even after an out-of-memory error."""
    strategy, data = prepared(
        make_runner, optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}}, train_dataloader=loader(20)
    )
    before = state(strategy)
    find_batch_size(strategy, data, limit=8, steps=1)
    assert equal(before, state(strategy))


def test_a_dataset_without_a_length_can_have_a_limit(make_runner: MakeRunner):
    """On the CPU, the default limit is 1,024; with a stream, the first samples are used."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return itertools.cycle(Samples()[index] for index in range(13))

    strategy, data = prepared(
        make_runner, model={"type": Bowl}, optim_wrapper=PLAIN, train_dataloader=loader(dataset=Stream()),
        train_cfg={"max_iters": 9},
    )  # fmt: skip
    assert find_batch_size(strategy, data, limit=4, steps=1).largest == 4


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"steps": 0}])
def test_invalid_search_numbers_are_rejected(make_runner: MakeRunner, arguments: dict[str, int]):
    """A batch size or a number of steps below 1 raises an error."""
    strategy, data = prepared(make_runner)
    with pytest.raises(ConfigValueError, match="integer >= 1"):
        find_batch_size(strategy, data, **arguments)


# ---- several processes ------------------------------------------------------------------------------------------------


def _sweep_on_a_rank(folder: str) -> tuple[list[float], bool]:
    class Ranked(Bowl):
        """A model whose loss differs between ranks."""

        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            return {"loss": self.weight**2 / 2 + torch.distributed.get_rank()}

    runner = Runner(
        **settings(
            model={"type": Ranked},
            optim_wrapper=PLAIN,
            work_dir=folder,
            strategy={"type": "DDPStrategy"},
            launcher="pytorch",
        )
    )
    try:
        loop = runner.prepare()
        before = state(runner.strategy)
        found = find_learning_rate(runner.strategy, loop.dataloader, low=1e-3, high=1e-2, steps=5)
        with pytest.raises(PlacementError, match="single process, but there are 2"):
            find_batch_size(runner.strategy, loop.dataloader)
        return found.losses.tolist(), equal(before, state(runner.strategy))
    finally:
        runner.close()


def test_every_rank_uses_the_mean_over_all_ranks(ranks: Any, tmp_path: Path):
    """All ranks use the mean loss, so they stop at the same rate; the batch size search is rejected on ranks."""
    first, second = ranks.run(_sweep_on_a_rank, str(tmp_path))
    assert first == second
    assert first[0][0] == pytest.approx(0.5 + 0.5)
    assert first[1]
