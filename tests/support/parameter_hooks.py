"""A model with hooks on the gradients of its parameters, trained by each strategy and by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.errors import StratagemError
from stratagem.model import BaseModel
from stratagem.registry import STRATEGIES
from tests.support.backward_passes import weights_of

ITERATIONS = 4
BATCH = 8
OPTIM: Mapping[str, Any] = {"type": "SGD", "lr": 0.1, "momentum": 0.9}


class Hooked(BaseModel):
    """Two layers that a tensor-parallel plan shards and one that it does not."""

    tp_plan: Mapping[str, str] = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.other = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        """Return the loss."""
        return {"loss": (self.other(x + self.down(torch.tanh(self.up(x)))) - y).square().mean()}

    def mask(self, gradient: Tensor) -> Tensor:
        """Return the gradient with zeros in the last rows."""
        self.calls += 1
        masked = gradient.clone()
        masked[len(masked) // 2 :] = 0
        return masked

    def mask_accumulated(self, parameter: Tensor) -> None:
        """Set the last rows of the accumulated gradient to zero."""
        self.calls += 1
        assert parameter.grad is not None
        parameter.grad[len(parameter.grad) // 2 :] = 0

    def double(self, parameter: Tensor) -> None:
        """Double the accumulated gradient, which also works for a shard."""
        self.calls += 1
        assert parameter.grad is not None
        parameter.grad.mul_(2)


def mask_with(name: str) -> Callable[[Hooked], Any]:
    """Return a function that registers a masking hook on a parameter with ``register_hook``."""
    return lambda model: model.get_parameter(name).register_hook(model.mask)


def mask_accumulated_with(name: str) -> Callable[[Hooked], Any]:
    """Return a function that registers a masking hook with ``register_post_accumulate_grad_hook``."""
    return lambda model: model.get_parameter(name).register_post_accumulate_grad_hook(model.mask_accumulated)


KINDS: Mapping[str, Callable[[Hooked], Any]] = {
    "register_hook": mask_with("other.weight"),
    "post": mask_accumulated_with("other.weight"),
    "register_hook up": mask_with("up.weight"),
    "post up": mask_accumulated_with("up.weight"),
    "double up": lambda model: model.up.weight.register_post_accumulate_grad_hook(model.double),
}


def batch(iteration: int) -> tuple[Tensor, Tensor]:
    """Return the samples of all ranks for an iteration."""
    generator = torch.Generator().manual_seed(iteration)
    return torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 2, generator=generator)


def by_hand(kind: str, window: int) -> tuple[int, dict[str, Tensor]]:
    """Train with plain torch in one process; return the number of calls of the hook and the weights."""
    model = Hooked()
    KINDS[kind](model)
    optimizer = torch.optim.SGD(model.parameters(), **{k: v for k, v in OPTIM.items() if k != "type"})
    for iteration in range(ITERATIONS):
        (model(*batch(iteration))["loss"] / window).backward()
        if (iteration + 1) % window == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model.calls, {name: each.detach().clone() for name, each in model.named_parameters()}


def trained(
    strategy: Mapping[str, Any], folder: str, kind: str, window: int, *, late: bool = False, compiled: bool = False
) -> tuple[int, dict[str, Tensor]] | str:
    """Train with a strategy; return the calls of the hook and the weights, or the error.

    Args:
        strategy: the configuration of the strategy.
        folder: the work directory.
        kind: a key of ``KINDS``.
        window: the number of micro-batches in an update.
        late: whether the hook is registered after the model was prepared.
        compiled: whether the model is compiled.
    """
    with warnings.catch_warnings():
        # Ignore the warnings that the engines and the compiler cause.
        warnings.simplefilter("ignore")
        built: Any = STRATEGIES.build({"work_dir": folder, "log_kwargs": {"log_level": "ERROR"}, **strategy})
        try:
            original = Hooked()
            if not late:
                KINDS[kind](original)
            model, wrapper, *_ = built.prepare(
                original,
                optim_wrapper={"optimizer": dict(OPTIM), "accumulative_counts": window},
                compile={"backend": "aot_eager"} if compiled else False,
                dispatch_kwargs={"max_iters": ITERATIONS, "train_micro_batch_size_per_gpu": BATCH // built.dp_size},
            )
            if late:
                KINDS[kind](built.unwrap_model())
            for iteration in range(ITERATIONS):
                share = tuple(each.chunk(built.dp_size)[built.dp_rank] for each in batch(iteration))
                model.train_step(share, optim_wrapper=wrapper)
            return built.unwrap_model().calls, weights_of(built)
        except StratagemError as error:
            return str(error)
        finally:
            built.close()


def all_trained(
    strategy: Mapping[str, Any], folder: str, kinds: Sequence[str], window: int = 2, **options: bool
) -> dict[str, tuple[int, dict[str, Tensor]] | str]:
    """Return the results of several kinds of hooks."""
    return {kind: trained(strategy, folder, kind, window, **options) for kind in kinds}


def require_equal(found: Mapping[str, Any], window: int = 2, tolerance: float = 1e-6) -> None:
    """Require the calls and the weights of plain torch for each kind of hook."""
    for kind, result in found.items():
        assert not isinstance(result, str), result
        calls, weights = by_hand(kind, window)
        assert result[0] == calls, kind
        for name, weight in weights.items():
            torch.testing.assert_close(result[1][name].float(), weight, rtol=0, atol=tolerance)
