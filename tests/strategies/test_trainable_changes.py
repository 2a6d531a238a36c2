"""Parameters may be frozen and unfrozen during a run under every strategy, and after a resume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import PlacementError
from stratagem.model import BaseModel
from stratagem.optim import MultiOptimWrapperConstructor
from stratagem.parallel.trainable import TrainableParameters
from stratagem.strategies import BaseStrategy, DDPStrategy, SingleDeviceStrategy
from tests.support.ranks import RankError, Ranks
from tests.support.small_runs import Lines
from tests.support.trainable_runs import (
    SCENARIOS,
    Net,
    batch,
    by_hand,
    compare,
    iterate,
    prepared,
    trained,
)

# The ranks sum the same float32 products in a different order, as in test_fsdp_equality.py.
TOLERANCE = 1e-5
# bfloat16 has 8 significant bits: 2**-9 = 0.2 % of the gradients, which are below 2. Ten updates with lr=0.05 sum to at most
# 10 x 0.05 x 2 x 0.002 = 0.002.
BFLOAT16 = 2e-3
LOGGER = logging.getLogger("stratagem.test")


def combinations(kind: str, folder: str, lengths: list[int], optimizers: list[str]) -> dict[Any, dict[str, Any]]:
    """Train every scenario with one kind of strategy."""
    return {
        (scenario, length, optimizer): trained(kind, folder, scenario, length, optimizer)
        for scenario in SCENARIOS
        for length in lengths
        for optimizer in optimizers
    }


@pytest.mark.parametrize("kind", ["DDP", "DDP, unused", "DDP, views", "FSDP", "TP"])
def test_unfreezing_during_a_run_trains_as_one_process(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """Losses and weights equal those of a manual loop, and are equal on all ranks, also inside of accumulation windows."""
    both = ranks.run(combinations, kind, str(tmp_path), [1, 3], ["SGD"])
    for setting, first in both[0].items():
        expected = by_hand(*setting)
        assert compare(first, expected) < TOLERANCE, setting
        assert compare(first, both[1][setting]) == 0, setting
        assert first["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE), setting


def test_unfreezing_under_fsdp_with_bfloat16_reduces_in_float32(ranks: Ranks, tmp_path: Path) -> None:
    """A frozen module that becomes trainable is reduced like the others, also in the middle of an accumulation window."""
    both = ranks.run(combinations, "FSDP, bfloat16", str(tmp_path), [1, 2, 3], ["SGD"])
    for setting, first in both[0].items():
        assert compare(first, by_hand(*setting)) < BFLOAT16, setting
        assert compare(first, both[1][setting]) == 0, setting


def resume_everywhere(kind: str, folder: str, source: str | None, *, write: bool) -> dict[Any, tuple[Any, Any]]:
    """For some scenarios, return the results without an interruption and with one, and leave the checkpoints in a folder."""
    results = {}
    for scenario, length, stop in (
        ("all at once", 1, 5),
        ("all at once", 2, 6),
        ("off and on", 2, 7),
        ("off and on", 3, 5),
    ):
        path = f"{source}/{scenario} {length}"
        settings = (scenario, length, "AdamW")
        if write:
            trained(kind, folder, *settings, save=path, stop=stop)
        # Under FSDP, an interrupted window starts again, so only complete ones are compared.
        if write and kind.startswith("FSDP") and stop % length:
            continue
        results[settings] = trained(kind, folder, *settings), trained(kind, folder, *settings, resume=path, start=stop)
    return results


@pytest.mark.parametrize("kind", ["DDP", "FSDP", "FSDP, bfloat16"])
def test_resuming_after_unfreezing_equals_the_uninterrupted_run(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """The checkpoint contains which parameters are trainable, so the resumed run has the same bits."""
    for first in ranks.run(resume_everywhere, kind, str(tmp_path), str(tmp_path), write=True):
        for setting, (whole, resumed) in first.items():
            assert compare(whole, resumed) == 0, setting


@pytest.mark.slow
def test_resuming_in_one_process_after_unfreezing_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """The resumed run trains the parameters that were trainable, with the same bits."""
    for whole, resumed in resume_everywhere("single", str(tmp_path), str(tmp_path), write=True).values():
        assert compare(whole, resumed) == 0


@pytest.mark.parametrize(
    ("source", "target"), [("single", "DDP"), ("single", "FSDP"), ("DDP", "FSDP"), ("FSDP", "DDP")]
)
def test_trainable_parameters_survive_a_change_of_strategy(
    ranks: Ranks, tmp_path: Path, source: str, target: str
) -> None:
    """A run that is resumed under another strategy after unfreezing continues as one process would."""
    path = str(tmp_path / "checkpoint")
    run = {"scenario": "all at once", "length": 1, "optimizer": "SGD"}
    if source == "single":
        trained(source, str(tmp_path), **run, save=path, stop=5)
    else:
        ranks.run(trained, source, str(tmp_path), **run, save=path, stop=5)
    first, _ = ranks.run(trained, target, str(tmp_path), **run, resume=path, start=5)
    assert compare(first, by_hand(**run)) < TOLERANCE


def different_changes(kind: str, folder: str) -> list[float]:
    """Unfreeze a different layer on each rank."""
    strategy = prepared(kind, folder)
    return iterate(strategy, {2: (True, f"blocks.{strategy.rank}")}, 0, 3)


@pytest.mark.parametrize("kind", ["DDP", "FSDP"])
def test_unfreezing_different_parameters_on_each_rank_is_an_error(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """The error names the parameters and the rank that did not make the same change."""
    with pytest.raises(
        RankError, match=r"Iteration 3: on rank 0, 2 parameters became trainable: blocks\.0\.weight.*rank 1"
    ):
        ranks.run(different_changes, kind, str(tmp_path))


class Gan(BaseModel):
    """Two parts that are trained in turn: in each half of a step, the other part is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)
        # Frozen at the start and only trainable within the step.
        self.extra = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the outputs of the critic for generated samples."""
        return self.critic(torch.tanh(self.generator(x)))

    def train_step(self, data: Tensor, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train the critic and then the generator."""
        self.extra.requires_grad_(True)
        self.critic.requires_grad_(True)
        with torch.no_grad():
            fake = torch.tanh(self.generator(data))
        critic_loss = (self.critic(fake) - self.critic(self.extra(data)) ** 2).mean()
        optim_wrapper["critic"].backward(critic_loss)
        for name in ("critic", "extra"):
            optim_wrapper[name].step()
            optim_wrapper[name].zero_grad()
        self.critic.requires_grad_(False)
        self.extra.requires_grad_(False)
        generator_loss = -self(data).mean()
        optim_wrapper["generator"].update_params(generator_loss)
        return {"loss": generator_loss.detach()}


def gan_weights(folder: str, kind: type[BaseStrategy], **options: Any) -> dict[str, Tensor]:
    """Train the two parts in turn."""
    strategy = kind(
        work_dir=folder, env_kwargs={"randomness": {"seed": 0}}, log_kwargs={"log_level": "ERROR"}, **options
    )
    model = Gan()
    strategy.prepare(
        model,
        optim_wrapper={
            "constructor": MultiOptimWrapperConstructor,
            **{name: {"optimizer": {"type": "SGD", "lr": 0.1}} for name in ("generator", "critic", "extra")},
        },
    )
    for iteration in range(4):
        data = batch(iteration)[0][strategy.dp_rank :: strategy.dp_size]
        strategy.model.train_step(data, optim_wrapper=strategy.optim_wrapper)
    strategy.close()
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{"model_wrapper": "separate"}, {"model_wrapper": {"type": "separate", "find_unused_parameters": True}}]
)
def test_parts_that_are_frozen_in_turn_within_a_step_train_as_in_one_process(
    ranks: Ranks, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A GAN that freezes its critic while it trains the generator has synchronized gradients in both halves of a step."""
    expected = gan_weights(str(tmp_path), SingleDeviceStrategy)
    first, second = ranks.run(gan_weights, str(tmp_path), DDPStrategy, **options)
    for name, weight in expected.items():
        assert (weight - first[name]).abs().max() < TOLERANCE, name
        assert torch.equal(first[name], second[name]), name


def frozen_at_start(folder: str) -> dict[str, Tensor]:
    """Train a model under DDP that is completely frozen until the first step."""
    strategy = DDPStrategy(work_dir=folder, env_kwargs={"randomness": {"seed": 0}}, log_kwargs={"log_level": "ERROR"})
    model = Net().requires_grad_(False)
    strategy.prepare(model, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}})
    iterate(strategy, {0: (True, ".")}, 0, 2)
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def test_a_model_that_is_frozen_at_the_start_is_synchronized_later(ranks: Ranks, tmp_path: Path) -> None:
    """DDP wraps the model although nothing is trainable yet."""
    first, second = ranks.run(frozen_at_start, str(tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.weight"], Net().stem.weight)


def started(
    single: Callable[..., BaseStrategy], folder: Path, optim: dict[str, Any] | None = None
) -> tuple[BaseStrategy, Lines]:
    """Return a prepared strategy for one process, and its log lines."""
    strategy = single(folder)
    lines = Lines(strategy)
    strategy.prepare(Net(), optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}, **(optim or {})})
    return strategy, lines


def test_a_change_is_logged_once_with_its_iteration(single: Callable[..., BaseStrategy], tmp_path: Path) -> None:
    """The log names the trainable parameters at the start, and each change with the number of the iteration."""
    strategy, lines = started(single, tmp_path)
    iterate(strategy, {2: (True, "blocks.0"), 4: (False, "blocks.0.bias")}, 0, 6)
    found = [line for line in lines.lines if "trainable" in line or "frozen" in line]
    assert found == [
        "INFO 2 of 12 parameters are trainable: head.weight, head.bias. Frozen: scale, gain, stem.weight, stem.bias, blocks.0.weight and 5 more.",  # noqa: E501
        "INFO Iteration 3: 2 parameters became trainable: blocks.0.weight, blocks.0.bias.",
        "INFO Iteration 5: 1 parameter became frozen: blocks.0.bias.",
    ]


def test_a_trainable_parameter_without_an_optimizer_is_an_error(
    single: Callable[..., BaseStrategy], tmp_path: Path
) -> None:
    """A parameter that ``freeze`` excluded from the optimizer cannot become trainable without a word."""
    strategy, _ = started(single, tmp_path, {"paramwise_cfg": {"freeze": ["stem"]}})
    with pytest.raises(
        PlacementError, match=r"Iteration 2: 2 parameters .* no optimizer has.*stem\.weight, stem\.bias"
    ):
        iterate(strategy, {1: (True, "stem")}, 0, 2)


def test_a_parameter_may_be_added_to_the_optimizer_and_unfrozen(
    single: Callable[..., BaseStrategy], tmp_path: Path
) -> None:
    """A parameter in a group that was added during the run is trained."""
    strategy, _ = started(single, tmp_path, {"paramwise_cfg": {"freeze": ["stem"]}})
    model = strategy.unwrap_model()
    before = model.stem.weight.detach().clone()
    iterate(strategy, {}, 0, 1)
    strategy.optim_wrapper.optimizer.add_param_group({"params": list(model.stem.parameters())})
    iterate(strategy, {1: (True, "stem")}, 1, 2)
    assert not torch.equal(model.stem.weight, before)


def test_loading_weights_does_not_change_what_is_trainable(single: Callable[..., BaseStrategy], tmp_path: Path) -> None:
    """``load_checkpoint`` only reads the weights."""
    strategy, _ = started(single, tmp_path / "first")
    strategy.unwrap_model().requires_grad_(True)
    strategy.save_checkpoint(tmp_path / "checkpoint")
    other, _ = started(single, tmp_path / "second")
    other.load_checkpoint(tmp_path / "checkpoint")
    assert not other.unwrap_model().stem.weight.requires_grad


def test_an_older_checkpoint_does_not_change_what_is_trainable(
    single: Callable[..., BaseStrategy], tmp_path: Path
) -> None:
    """A checkpoint without this information leaves the parameters as the run has them."""
    strategy, _ = started(single, tmp_path / "first")
    strategy.unwrap_model().requires_grad_(True)
    strategy.save_checkpoint(tmp_path / "checkpoint", callback=lambda tree: tree["meta"].pop("trainable"))
    other, _ = started(single, tmp_path / "second")
    other.resume(tmp_path / "checkpoint")
    assert not other.unwrap_model().stem.weight.requires_grad


def test_a_completely_unfrozen_model_resumes_unfrozen(single: Callable[..., BaseStrategy], tmp_path: Path) -> None:
    """A checkpoint without frozen parameters makes those of the resumed run trainable, and the log names them."""
    strategy, _ = started(single, tmp_path / "first")
    strategy.unwrap_model().requires_grad_(True)
    strategy.save_checkpoint(tmp_path / "checkpoint")
    other, lines = started(single, tmp_path / "second")
    other.resume(tmp_path / "checkpoint")
    assert all(each.requires_grad for each in other.unwrap_model().parameters())
    assert "WARNING As in the checkpoint, 10 parameters became trainable: scale, gain" in lines.text


def test_resuming_without_the_optimizer_keeps_what_is_trainable(
    single: Callable[..., BaseStrategy], tmp_path: Path
) -> None:
    """With ``resume_optimizer=False`` the run keeps its own trainable parameters, and a warning names the difference."""
    strategy, _ = started(single, tmp_path / "first")
    strategy.unwrap_model().requires_grad_(True)
    strategy.save_checkpoint(tmp_path / "checkpoint")
    other, lines = started(single, tmp_path / "second")
    other.resume(tmp_path / "checkpoint", resume_optimizer=False)
    assert not other.unwrap_model().stem.weight.requires_grad
    assert (
        "WARNING Compared with this run, the checkpoint was saved with different trainable parameters: 10" in lines.text
    )


def test_an_unchanged_model_costs_no_communication() -> None:
    """Without a change, a check neither prepares the placement nor compares the ranks."""
    model = Net()

    def fail(*_: Any) -> Any:
        raise AssertionError

    watch = TrainableParameters(model, list, fail, LOGGER)
    watch._agreement.find_disagreement = fail  # type: ignore[method-assign]
    for _ in range(3):
        watch.check()
