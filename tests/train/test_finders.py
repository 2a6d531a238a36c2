"""Find settings by trying, and leave no trace."""

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
from toys import Samples, Toy, loader, settings

from stratagem import Runner
from stratagem.errors import ConfigKeyError, ConfigValueError, PlacementError, TrainingError
from stratagem.model import BaseModel
from stratagem.train.tools import find_batch_size, find_learning_rate
from stratagem.train.tools.find_batch_size import _largest

MakeRunner = Callable[..., Runner]


class Bowl(BaseModel):
    """The loss is half the square of one weight, which begins at 1; the data plays no part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[int] = []

    def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
        self.seen.append(len(inputs))
        return {"loss": self.weight**2 / 2}


def prepared(make_runner: MakeRunner, **changes: Any) -> tuple[Any, Any]:
    """Return a strategy that could train and the loader of its data."""
    runner = make_runner(**changes)
    loop = runner.prepare()
    return runner.strategy, loop.dataloader


PLAIN = {"optimizer": {"type": "SGD", "lr": 0.5}}


def state(strategy: Any) -> dict[str, Any]:
    """Return all that a finder could disturb."""
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


def test_the_losses_are_those_of_steps_with_growing_rates(make_runner: MakeRunner):
    """On w**2 / 2 a step of rate r makes w to (1 - r) w: rates 0.01, 0.02, 0.04 ... computed by hand."""
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


def test_the_suggestions_are_the_steepest_point_and_a_decade_below_the_least(make_runner: MakeRunner):
    """The sweep ends while the loss still falls, so the least is at the last rate."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=0.01, high=0.64, steps=7, smoothing=0.0)
    assert found.below_minimum == pytest.approx(0.064)
    # Differences of the losses around each rate, the rates being evenly spaced in their logarithm.
    slopes = [found.losses[number + 1] - found.losses[number - 1] for number in range(1, 6)]
    assert found.steepest == pytest.approx(found.rates[1 + int(np.argmin(slopes))])


def test_it_stops_where_the_loss_diverges(make_runner: MakeRunner):
    """Rates beyond 2 make |1 - r| larger than 1; what they do is seen some steps of 1.26 times the rate later."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=1e-3, high=1e3, steps=60)
    assert found.diverged
    assert 2.0 < found.rates[-1] < 1e3
    assert found.least is not None
    assert 1.0 < found.least < 2.0 * 1.26**3


def test_a_loss_that_never_falls_suggests_nothing(make_runner: MakeRunner):
    """All rates are too large."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=3.0, high=30.0, steps=20)
    assert found.diverged
    assert (found.steepest, found.below_minimum) == (None, None)


def test_smoothing_does_not_move_a_valley(make_runner: MakeRunner):
    """A loss that is symmetric around its least has it at the same rate after smoothing."""
    losses = iter(abs(number - 20.0) for number in range(41))

    class Valley(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            return {"loss": self.weight * 0 + next(losses)}

    strategy, data = prepared(make_runner, model={"type": Valley}, optim_wrapper=PLAIN)
    found = find_learning_rate(strategy, data, low=1e-4, high=1.0, steps=41)
    assert found.smoothed.argmin() == 20


def test_a_loss_that_explodes_is_not_felt_before(make_runner: MakeRunner):
    """The least stays at the last rate before it, and the smoothed loss shows the explosion."""
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
    """A group of twice the rate has twice the rate that is swept, whatever the rate of the configuration."""
    strategy, data = prepared(
        make_runner, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}, "paramwise_cfg": {"bias_lr_mult": 2.0}}
    )
    used = []
    step = strategy.optim_wrapper.optimizer.step
    strategy.optim_wrapper.optimizer.step = lambda: (used.append(strategy.optim_wrapper.get_lr()["lr"]), step())
    find_learning_rate(strategy, data, low=1e-3, high=1e-1, steps=5)
    assert used[0] == pytest.approx([1e-3, 2e-3])
    assert used[-1] == pytest.approx([1e-1, 2e-1])


def test_one_rate_is_for_one_step_of_the_optimizer(make_runner: MakeRunner):
    """With 3 micro-batches a step, 5 rates take 15 iterations, in a run of 9 too."""
    strategy, data = prepared(
        make_runner,
        model={"type": Bowl},
        optim_wrapper={**PLAIN, "accumulative_counts": 3},
        train_cfg={"max_iters": 9},
    )
    found = find_learning_rate(strategy, data, low=1e-3, high=1e-1, steps=5)
    assert len(found.losses) == 5
    assert len(strategy.model.seen) == 15


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_sweep_leaves_no_trace(make_runner: MakeRunner, optimizer: str):
    """Weights, optimizer, modes, generators, gradients: bit by bit; and the training that follows is the same."""
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


def test_a_sweep_that_fails_leaves_no_trace_either(make_runner: MakeRunner):
    """The error comes through, and the weights are what they were."""
    strategy, data = prepared(make_runner)
    before = state(strategy)
    with pytest.raises(ConfigKeyError, match=r"no 'los'.*'loss'"):
        find_learning_rate(strategy, data, loss="los")
    assert equal(before, state(strategy))


def test_gradients_that_are_refused_end_the_sweep(make_runner: MakeRunner):
    """nonfinite='error' is what a diverging sweep provokes."""
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
def test_numbers_that_make_no_sweep(make_runner: MakeRunner, arguments: dict[str, Any], text: str):
    """The number is shown, and what is due."""
    strategy, data = prepared(make_runner)
    with pytest.raises(ConfigValueError, match=text):
        find_learning_rate(strategy, data, **arguments)


class Pair(BaseModel):
    """Two weights, each with an optimizer of its own; the second is stepped in every other iteration."""

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


def test_one_of_several_optimizers_is_swept(make_runner: MakeRunner):
    """Over its own steps, however seldom they are; the other keeps its rate."""
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


def test_of_several_optimizers_one_must_be_named(make_runner: MakeRunner):
    """The message names them."""
    strategy, data = prepared(make_runner, **PAIR)
    with pytest.raises(ConfigValueError, match="one of first, second"):
        find_learning_rate(strategy, data)
    with pytest.raises(ConfigKeyError, match="'third'"):
        find_learning_rate(strategy, data, optimizer="third")


def test_an_optimizer_that_is_never_stepped_is_told(make_runner: MakeRunner):
    """Rather than waiting for it for ever."""

    class Lazy(Pair):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            return {"loss": torch.zeros(())}

    strategy, data = prepared(make_runner, **{**PAIR, "model": {"type": Lazy}})
    with pytest.raises(TrainingError, match="100 iterations went by and the optimizer was not stepped"):
        find_learning_rate(strategy, data, optimizer="first")


def test_an_optimizer_by_name_where_there_is_one(make_runner: MakeRunner):
    """It has no name."""
    strategy, data = prepared(make_runner)
    with pytest.raises(ConfigKeyError, match="one optimizer"):
        find_learning_rate(strategy, data, optimizer="generator")


def test_a_loss_that_is_not_finite_at_once(make_runner: MakeRunner):
    """There is nothing to show."""

    class Broken(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            return {"loss": self.weight * float("nan")}

    strategy, data = prepared(make_runner, model={"type": Broken}, optim_wrapper=PLAIN)
    with pytest.raises(TrainingError, match="not finite at the smallest"):
        find_learning_rate(strategy, data)


# ---- the batch size ---------------------------------------------------------------------------------------------------


class Small(Bowl):
    """Memory for 11 samples."""

    def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
        if len(inputs) > 11:
            raise torch.OutOfMemoryError("no more")
        return super().forward(inputs, mode=mode)


@pytest.mark.parametrize("capacity", range(21))
def test_doubling_and_bisection_find_the_largest(capacity: int):
    """Whatever the largest is, up to the limit of 20, in few trials."""
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= capacity

    assert _largest(fits, 20) == capacity
    assert len(tried) == len(set(tried)) <= 10
    assert max(tried) <= 20


def test_the_largest_batch_that_fits_is_found(make_runner: MakeRunner):
    """By the errors of memory; each size that was tried is told, with its time where it has one."""
    strategy, data = prepared(make_runner, model={"type": Small}, optim_wrapper=PLAIN, train_dataloader=loader(100))
    found = find_batch_size(strategy, data)
    assert found.largest == 11
    assert found.out_of_memory
    assert [trial.batch_size for trial in found.trials] == [1, 2, 4, 8, 10, 11, 12, 16]
    assert [trial.seconds is None for trial in found.trials] == [False] * 6 + [True] * 2
    assert found.knee in {1, 2, 4, 8, 10, 11}


def test_the_search_ends_at_the_limit_or_the_dataset(make_runner: MakeRunner):
    """A batch cannot have more samples than there are: 13."""
    strategy, data = prepared(make_runner, model={"type": Bowl}, optim_wrapper=PLAIN)
    found = find_batch_size(strategy, data)
    assert (found.largest, found.limit, found.out_of_memory) == (13, 13, False)
    assert find_batch_size(strategy, data, limit=3).largest == 3


def test_not_even_one_sample(make_runner: MakeRunner):
    """Then there is no largest and no knee."""

    class Full(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            raise MemoryError

    strategy, data = prepared(make_runner, model={"type": Full}, optim_wrapper=PLAIN)
    found = find_batch_size(strategy, data)
    assert (found.largest, found.knee) == (None, None)


def test_other_errors_are_not_taken_for_memory(make_runner: MakeRunner):
    """A mistake in the model comes through."""

    class Wrong(Bowl):
        def forward(self, inputs: Tensor, *rest: Any, mode: str = "tensor") -> Any:
            raise RuntimeError("shapes do not fit")

    strategy, data = prepared(make_runner, model={"type": Wrong}, optim_wrapper=PLAIN)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        find_batch_size(strategy, data)


def test_a_search_leaves_no_trace(make_runner: MakeRunner):
    """Also where memory was not enough in the middle."""
    strategy, data = prepared(
        make_runner, optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}}, train_dataloader=loader(20)
    )
    before = state(strategy)
    find_batch_size(strategy, data, limit=8, steps=1)
    assert equal(before, state(strategy))


def test_a_dataset_without_length_needs_a_limit(make_runner: MakeRunner):
    """On the CPU the limit is 1,024 by itself; samples are the stream's first."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return itertools.cycle(Samples()[index] for index in range(13))

    strategy, data = prepared(
        make_runner, model={"type": Bowl}, optim_wrapper=PLAIN, train_dataloader=loader(dataset=Stream()),
        train_cfg={"max_iters": 9},
    )  # fmt: skip
    assert find_batch_size(strategy, data, limit=4, steps=1).largest == 4


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"steps": 0}])
def test_numbers_that_make_no_search(make_runner: MakeRunner, arguments: dict[str, int]):
    """A size and a count are at least 1."""
    strategy, data = prepared(make_runner)
    with pytest.raises(ConfigValueError, match="at least 1"):
        find_batch_size(strategy, data, **arguments)


# ---- several processes ------------------------------------------------------------------------------------------------


def _sweep_on_a_rank(folder: str) -> tuple[list[float], bool]:
    class Ranked(Bowl):
        """The loss differs from rank to rank."""

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
        with pytest.raises(PlacementError, match="one process, and there are 2"):
            find_batch_size(runner.strategy, loop.dataloader)
        return found.losses.tolist(), equal(before, state(runner.strategy))
    finally:
        runner.close()


def test_every_rank_sees_the_mean_of_all_ranks(ranks: Any, tmp_path: Path):
    """So all of them stop at the same rate; a search of the batch size is refused there."""
    first, second = ranks.run(_sweep_on_a_rank, str(tmp_path))
    assert first == second
    assert first[0][0] == pytest.approx(0.5 + 0.5)
    assert first[1]
