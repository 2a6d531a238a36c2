"""Several ways to call ``backward`` for one update, compared with plain torch on the samples of all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.dist import get_rank, get_world_size
from stratagem.model import BaseModel
from stratagem.registry import STRATEGIES
from tests.support.ranks import seed_generators

ITERATIONS = 5
BATCH = 8


class TwoHeads(BaseModel):
    """A model with two linear heads on one layer, whose step calls ``backward`` in one of several ways."""

    def __init__(self, way: str = "one pass") -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.way = way
        self.iteration = 0

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = "loss", heads: str = "ab") -> dict[str, Tensor]:
        """Return two losses: the distance to the targets, and the magnitude of the outputs."""
        features = torch.tanh(self.trunk(inputs))
        found = sum(getattr(self, head)(features) for head in heads)
        return {"near": (found - targets).square().mean(), "small": found.square().mean()}

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Take one step in the selected way."""
        self.iteration += 1
        return {"loss": WAYS[self.way](self, data, optim_wrapper).detach()}

    def losses(self, data: Any, **options: Any) -> dict[str, Tensor]:
        """Compute both losses by calling the model, as a step does."""
        found: dict[str, Tensor] = self(*data, **options)
        return found


def one_pass(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Run one backward pass for the sum of the losses."""
    with optim.optim_context(model):
        losses = model.losses(data)
    optim.update_params(losses["near"] + losses["small"])
    return losses["near"]


def two_forwards(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Run two forward passes, then one backward pass for each."""
    with optim.optim_context(model):
        near, small = model.losses(data)["near"], model.losses(data)["small"]
    optim.backward(near)
    optim.backward(small)
    optim.step()
    optim.zero_grad()
    return near


def in_turn(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Run a forward and a backward pass, twice."""
    for name in ("near", "small"):
        with optim.optim_context(model):
            loss = model.losses(data)[name]
        optim.backward(loss)
    optim.step()
    optim.zero_grad()
    return loss


def one_forward(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Run two backward passes through the same graph."""
    with optim.optim_context(model):
        losses = model.losses(data)
    optim.backward(losses["near"], retain_graph=True)
    optim.backward(losses["small"])
    optim.step()
    optim.zero_grad()
    return losses["near"]


def by_hand(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Call ``backward`` of the losses directly."""
    with optim.optim_context(model):
        losses = model.losses(data)
    losses["near"].backward(retain_graph=True)
    losses["small"].backward()
    optim.step()
    optim.zero_grad()
    return losses["near"]


def by_hand_and_wrapper(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Call ``backward`` of one loss directly and pass the other to the wrapper."""
    with optim.optim_context(model):
        losses = model.losses(data)
    losses["near"].backward(retain_graph=True)
    optim.backward(losses["small"])
    optim.step()
    optim.zero_grad()
    return losses["near"]


def own_window(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Update in every second iteration, independently of the wrapper."""
    with optim.optim_context(model):
        losses = model.losses(data)
    (losses["near"] + losses["small"]).backward()
    if model.iteration % 2 == 0:
        optim.step()
        optim.zero_grad()
    return losses["near"]


def a_head_each(model: TwoHeads, data: Any, optim: Any) -> Tensor:
    """Train the heads alternately; in the variant with "NaN" in its name, the loss of iteration 2 is NaN."""
    with optim.optim_context(model):
        loss = model.losses(data, heads=head_of(model.iteration))["near"]
    optim.update_params(loss * torch.nan if "NaN" in model.way and model.iteration == 2 else loss)
    return loss


def head_of(iteration: int) -> str:
    """Return the head that an iteration, counted from 1, trains."""
    return "ab"[(iteration - 1) % 2]


# Each of these sums the gradients of both losses in one update.
SUMS: Mapping[str, Callable[..., Tensor]] = {
    "one pass": one_pass,
    "two forwards": two_forwards,
    "in turn": in_turn,
    "one forward": one_forward,
    "by hand": by_hand,
    "by hand and wrapper": by_hand_and_wrapper,
}
WAYS: Mapping[str, Callable[..., Tensor]] = {
    **SUMS,
    "own window": own_window,
    "a head each": a_head_each,
    "a head each, one NaN": a_head_each,
}
OPTIMIZERS: Mapping[str, dict[str, Any]] = {
    "SGD": {"type": "SGD", "lr": 0.1},
    "AdamW": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1},
}


def batch(iteration: int) -> tuple[Tensor, Tensor]:
    """Return the samples of all ranks for an iteration."""
    generator = torch.Generator().manual_seed(iteration)
    return torch.randn(BATCH, 4, generator=generator), torch.randn(BATCH, 2, generator=generator)


def built(way: str) -> TwoHeads:
    """Return a model with the same weights in every process."""
    seed_generators(3)
    return TwoHeads(way)


def by_plain_torch(
    way: str, optimizer: str = "SGD", *, max_norm: float | None = None, window: int = 1
) -> list[dict[str, Tensor]]:
    """Return the weights after each iteration of a plain torch loop."""
    model = built(way)
    kind = dict(OPTIMIZERS[optimizer])
    stepping: torch.optim.Optimizer = getattr(torch.optim, kind.pop("type"))(model.parameters(), **kind)
    seen = []
    is_finite = True
    for iteration in range(1, ITERATIONS + 1):
        if way.startswith("a head each"):
            loss = model.losses(batch(iteration), heads=head_of(iteration))["near"] / window
            is_finite = is_finite and not ("NaN" in way and iteration == 2)
        else:
            loss = sum(model.losses(batch(iteration)).values())
        loss.backward()
        if iteration % window == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            if is_finite:
                stepping.step()
            stepping.zero_grad()
            is_finite = True
        seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return seen


def trained(strategy: Mapping[str, Any], folder: str, way: str, optim: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Train on this rank's samples; return the full weights after each iteration."""
    with warnings.catch_warnings():
        # Ignore the warnings that the engines cause.
        warnings.simplefilter("ignore")
        placing = STRATEGIES.build({"work_dir": folder, "log_kwargs": {"log_level": "ERROR"}, **strategy})
        try:
            model, wrapper = placing.prepare(built(way), optim_wrapper=dict(optim), dispatch_kwargs={"max_iters": 1000})
            seen = []
            for iteration in range(1, ITERATIONS + 1):
                model.train_step(of_this_rank(batch(iteration)), wrapper)
                seen.append(weights_of(placing))
            return seen
        finally:
            placing.close()


def of_this_rank(samples: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return this rank's part of the samples."""
    return tuple(each.chunk(get_world_size())[get_rank()] for each in samples)


def weights_of(strategy: Any) -> dict[str, Tensor]:
    """Return a copy of all weights, gathered if they are sharded. Collective."""
    state = strategy._access.model_state(strategy.unwrap_model())
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in state.items()
    }


def require_equal(
    found: list[list[dict[str, Tensor]]], expected: list[dict[str, Tensor]], *, tolerance: float = 2e-6
) -> None:
    """Require identical bits on all ranks after each iteration, and the expected values up to rounding."""
    one, other = found
    for iteration, weights in enumerate(expected):
        for name, value in weights.items():
            where = f"{name} after iteration {iteration + 1}"
            assert torch.equal(one[iteration][name], other[iteration][name]), where
            torch.testing.assert_close(
                one[iteration][name],
                value,
                rtol=0,
                atol=tolerance,
                msg=lambda reported, where=where: f"{where}: {reported}",
            )
