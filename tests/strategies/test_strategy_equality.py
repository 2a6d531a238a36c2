"""One process and two ranks compute the same training: samples, losses, learning rates and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.model import BaseModel, SupervisedModel
from stratagem.strategies import BaseStrategy
from tests.support.ranks import Ranks
from tests.support.small_runs import digest, make
from tests.support.training_loop import iterations

# Both runs sum the same float32 products in a different order. A sum of n terms may then differ by about n roundings
# of 2**-24 = 6e-8 relative to its size. Here, n is at most 16 samples x 64 pixels, and roundings mostly cancel:
# sqrt(1024) x 6e-8 = 2e-6. Updates propagate the difference, so 1e-5 of the loss and of the largest parameters (about
# 1) is allowed.
TOLERANCE = 1e-5
GLOBAL_BATCH = 16
EPOCH = 12  # 192 samples


class Patterns(torch.utils.data.Dataset[dict[str, Tensor]]):
    """192 images of 8 x 8 pixels with their index; the class is the brightest quadrant."""

    def __init__(self) -> None:
        self.images = torch.randn(192, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        quarters = self.images.unfold(2, 4, 4).unfold(3, 4, 4).sum((4, 5)).reshape(192, 4)
        self.classes = quarters.argmax(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.images[index], self.classes[index], index


def network(kind: str) -> nn.Module:
    """Return a small network without interaction between the samples of a batch."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 4)
    )  # fmt: skip


SGD = {"optimizer": {"type": "SGD", "lr": 0.2, "momentum": 0.9}}
ADAMW = {"optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1}}
ACCUMULATED = {"accumulative_counts": 2, "clip_grad": {"max_norm": 0.3}}


def prepared(kind: str, folder: str, network_kind: str, optim: Mapping[str, Any], iterations: int) -> BaseStrategy:
    """Return a prepared strategy with an iteration-based schedule."""
    strategy = make(kind, folder)
    strategy.prepare(
        SupervisedModel(network(network_kind), nn.CrossEntropyLoss()),
        optim_wrapper=optim,
        param_scheduler=[
            {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 6},
            {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 6},
        ],
        dispatch_kwargs={"epoch_length": EPOCH, "max_iters": iterations},
    )
    return strategy


def run(strategy: BaseStrategy, start: int, stop: int) -> dict[str, Any]:
    """Train iterations ``start`` to ``stop`` of the run and return all comparable results."""
    first = digest(strategy.unwrap_model())
    before = {name: tensor.clone() for name, tensor in strategy.model_state_dict().items()}
    steps = list(
        iterations(strategy, Patterns(), start, stop, global_batch=GLOBAL_BATCH, inputs=lambda batch: batch[:2])
    )
    state = {name: tensor.clone() for name, tensor in strategy.model_state_dict().items()}
    return {
        "first": first,
        "ids": [step.batch[2].tolist() for step in steps],
        "losses": [step.outputs["loss"].item() for step in steps],
        "rates": [step.rates for step in steps],
        "norms": [step.grad_norm for step in steps if step.grad_norm is not None],
        "state": state,
        "moved": min((state[name] - before[name]).abs().max().item() for name in state),
        "last": digest(strategy.unwrap_model()),
    }


def whole_run(kind: str, folder: str, network_kind: str, optim: Mapping[str, Any], iterations: int) -> dict[str, Any]:
    """Train from the beginning to the end."""
    strategy = prepared(kind, folder, network_kind, optim, iterations)
    try:
        return run(strategy, 0, iterations)
    finally:
        strategy.close()


def mean_of_ranks(results: list[dict[str, Any]]) -> list[float]:
    """Return the mean loss over the ranks in each iteration. All ranks have the same number of samples."""
    return [sum(losses) / len(losses) for losses in zip(*(each["losses"] for each in results), strict=True)]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compare parameters by name."""
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("network_kind", "optim"),
    [("mlp", {**SGD, **ACCUMULATED}), ("conv", {**ADAMW, **ACCUMULATED}), ("conv", SGD), ("mlp", ADAMW)],
)
def test_two_ranks_train_as_one_process_does(
    ranks: Ranks, tmp_path: Path, network_kind: str, optim: dict[str, Any]
) -> None:
    """Initial weights, samples, learning rates, losses and final weights are equal; the ranks are bit-identical.

    The run has 25 iterations in three epochs, a shorter last accumulation window, and gradient clipping.
    """
    alone = whole_run("single", str(tmp_path), network_kind, optim, 25)
    both = ranks.run(whole_run, "ddp", str(tmp_path), network_kind, optim, 25)
    assert both[0]["first"] == both[1]["first"] == alone["first"]
    assert both[0]["last"] == both[1]["last"]
    for iteration in range(25):
        assert sorted(both[0]["ids"][iteration] + both[1]["ids"][iteration]) == sorted(alone["ids"][iteration])
    assert both[0]["rates"] == both[1]["rates"] == alone["rates"]
    assert mean_of_ranks(both) == pytest.approx(alone["losses"], rel=TOLERANCE)
    assert both[0]["norms"] == pytest.approx(alone["norms"], rel=10 * TOLERANCE)
    assert_close(both[0]["state"], alone["state"])
    # The weights changed significantly, and the run included clipping and rates that only change with updates.
    assert alone["moved"] > 1000 * TOLERANCE
    if "clip_grad" in optim:
        assert max(alone["norms"]) > 0.3
        assert alone["rates"][2] == alone["rates"][3] != alone["rates"][4]


# ---- resuming with a different number of ranks ---------------------------------------------------------------------


def first_part(kind: str, folder: str, checkpoint: str) -> dict[str, Any]:
    """Train 10 of 20 iterations and save."""
    strategy = prepared(kind, folder, "conv", {**ADAMW, **ACCUMULATED}, 20)
    try:
        done = run(strategy, 0, 10)
        strategy.save_checkpoint(checkpoint, extra_ckpt={"meta": {"iter": 10}})
        return done
    finally:
        strategy.close()


def second_part(kind: str, folder: str, checkpoint: str) -> dict[str, Any]:
    """Resume and train to the end; ``log`` is the text that was logged."""
    strategy = prepared(kind, folder, "conv", {**ADAMW, **ACCUMULATED}, 20)
    try:
        strategy.resume(checkpoint)
        done = run(strategy, 10, 20)
        file = strategy.logger.log_file
        return {**done, "log": file.read_text() if file else ""}
    finally:
        strategy.close()


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_a_run_can_change_between_one_process_and_two_ranks(ranks: Ranks, tmp_path: Path, suffix: str) -> None:
    """The losses after resuming match an uninterrupted run, and the log reports the different world size."""
    folder = str(tmp_path)
    unbroken = whole_run("single", folder, "conv", {**ADAMW, **ACCUMULATED}, 20)
    by_two, by_one = str(tmp_path / f"two{suffix}"), str(tmp_path / f"one{suffix}")
    ranks.run(first_part, "ddp", folder, by_two)
    first_part("single", folder, by_one)
    alone = second_part("single", folder, by_two)
    both = ranks.run(second_part, "ddp", folder, by_one)
    for losses in (alone["losses"], mean_of_ranks(both)):
        assert losses == pytest.approx(unbroken["losses"][10:], rel=TOLERANCE)
    assert alone["rates"] == both[0]["rates"] == unbroken["rates"][10:]
    assert both[0]["last"] == both[1]["last"]
    assert_close(alone["state"], unbroken["state"])
    assert_close(both[0]["state"], unbroken["state"])
    assert "was saved by 2 ranks, but this run has 1" in alone["log"]
    assert "was saved by 1 ranks, but this run has 2" in both[0]["log"]


@pytest.mark.slow
def test_a_resumed_process_is_bit_identical(tmp_path: Path) -> None:
    """Losses and weights after resuming in one process are bit-identical to an uninterrupted run."""
    folder = str(tmp_path)
    unbroken = whole_run("single", folder, "conv", {**ADAMW, **ACCUMULATED}, 20)
    first_part("single", folder, str(tmp_path / "ten"))
    resumed = second_part("single", folder, str(tmp_path / "ten"))
    assert resumed["losses"] == unbroken["losses"][10:]
    assert resumed["last"] == unbroken["last"]


def resumed_on_ranks(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an uninterrupted run, and the second part of an interrupted one."""
    unbroken = whole_run("ddp", folder, "conv", {**ADAMW, **ACCUMULATED}, 20)
    first_part("ddp", folder, f"{folder}/ten")
    return unbroken, second_part("ddp", folder, f"{folder}/ten")


def test_two_resumed_ranks_are_bit_identical(ranks: Ranks, tmp_path: Path) -> None:
    """On the CPU, gradients are always reduced in the same order, so resumed ranks are bit-identical."""
    for unbroken, resumed in ranks.run(resumed_on_ranks, str(tmp_path)):
        assert resumed["losses"] == unbroken["losses"][10:]
        assert resumed["last"] == unbroken["last"]


# ---- weights -------------------------------------------------------------------------------------------------------


class Weighted(BaseModel):
    """A linear model whose micro-batches are weighted by their number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
            self.layer.bias.zero_()

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = "tensor") -> Any:
        outputs = self.layer(inputs).squeeze(1)
        return {"loss": nn.functional.mse_loss(outputs, targets), "weight": len(inputs)} if mode == "loss" else outputs


# How the 12 samples of a step are split into micro-batches, by (world size, number of micro-batches).
CUTS = {(1, 1): [[12]], (1, 2): [[7, 5]], (2, 2): [[1, 4], [5, 2]], (2, 1): [[3], [9]]}


def weighted_steps(kind: str, folder: str, count: int) -> dict[str, Tensor]:
    """Take three steps on the same 12 samples, split unevenly, and return the weights."""
    strategy = make(kind, folder)
    strategy.prepare(
        Weighted(),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, "accumulative_counts": count},
        dispatch_kwargs={"max_iters": 3 * count},
    )
    generator = torch.Generator().manual_seed(2)
    inputs, targets = torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator)
    cuts = CUTS[strategy.world_size, count]
    start = sum(sum(sizes) for sizes in cuts[: strategy.rank])
    for _ in range(3):
        at = start
        for size in cuts[strategy.rank]:
            strategy.model.train_step((inputs[at : at + size], targets[at : at + size]), strategy.optim_wrapper)
            at += size
    state = strategy.model_state_dict()
    strategy.close()
    return {name: tensor.clone() for name, tensor in state.items()}


def test_weighted_micro_batches_match_one_large_batch(ranks: Ranks, tmp_path: Path) -> None:
    """Uneven micro-batches and ranks give the mean over all samples, like one large batch."""
    folder = str(tmp_path)
    generator = torch.Generator().manual_seed(2)
    inputs, targets = torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator)
    layer = Weighted().layer
    plain = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        plain.zero_grad()
        nn.functional.mse_loss(layer(inputs).squeeze(1), targets).backward()
        plain.step()
    expected = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    for count in (1, 2):
        assert_close(weighted_steps("single", folder, count), expected)
        one, other = ranks.run(weighted_steps, "ddp", folder, count)
        assert_close(one, expected)
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---- checkpoints of plain torch -----------------------------------------------------------------------------------


def test_a_checkpoint_of_a_plain_torch_loop_can_be_resumed(tmp_path: Path) -> None:
    """The state dicts of a plain torch loop, which use indices, can be resumed with the same losses."""
    torch.manual_seed(0)
    model = SupervisedModel(network("mlp"), nn.CrossEntropyLoss())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    data = Patterns()
    losses = []
    for step in range(8):
        if step == 4:
            state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "meta": {"epoch": 1}}
            torch.save(state, tmp_path / "loop.pth")
        loss = nn.functional.cross_entropy(model(data.images[:16]), data.classes[:16])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    strategy = make("single", tmp_path)
    strategy.prepare(SupervisedModel(network("mlp"), nn.CrossEntropyLoss()), optim_wrapper=ADAMW)
    rest = strategy.resume(tmp_path / "loop.pth")
    assert rest["meta"]["epoch"] == 1
    batch = data.images[:16], data.classes[:16]
    resumed = [strategy.model.train_step(batch, strategy.optim_wrapper)["loss"].item() for _ in range(4)]
    strategy.close()
    # The fused kernel rounds differently from torch's default.
    assert resumed == pytest.approx(losses[4:], rel=TOLERANCE)
