"""Train a model in float64, or with gradients that are rounded differently, to measure the rounding errors of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.train import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run

__all__ = ["DoublePrecision", "RoundedGradients"]

# Half a unit in the last place of the largest element in float32, which another order of summation can change.
_ROUNDING: Final = 2.0**-24


@final
class DoublePrecision(Hook):
    """Convert the model to float64 before training, with equal initial values, and the inputs of each forward pass.

    Tensors that the model creates in the forward pass have dtype float64 by default. Data loading is unchanged, because
    random numbers in float64 would be different ones.
    """

    # The average must be built from the converted parameters.
    priority = Priority.VERY_HIGH

    def before_run(self, run: Run) -> None:
        model = run.strategy.unwrap_model()
        # Keeps the identity of the parameters, which the optimizer refers to.
        model.double()
        default = torch.get_default_dtype()

        def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            torch.set_default_dtype(torch.float64)
            return _to_double(args), _to_double(kwargs)

        def end(*_: Any) -> None:
            torch.set_default_dtype(default)

        handles = (
            model.register_forward_pre_hook(start, with_kwargs=True),
            model.register_forward_hook(end, always_call=True),
        )
        run.at_close.extend(handle.remove for handle in handles)


def _to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _to_double(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_to_double(each) for each in value]
    if type(value) is tuple:
        return tuple(_to_double(each) for each in value)
    return value


@final
class RoundedGradients(Hook):
    """Add 2^-24 times the largest element of a gradient to each of its elements, or subtract it, at random, before each step.

    Some optimizers compute in a dtype that does not depend on that of the parameters, such as Muon in bfloat16, so that a run
    in float64 has the same rounding errors, and the distance from it underestimates them.
    """

    def before_train(self, run: Run) -> None:
        generator = torch.Generator().manual_seed(0)

        def change(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _round_differently(parameter.grad, generator)

        for wrapper in run.optim_wrapper.each().values():
            run.at_close.append(wrapper.optimizer.register_step_pre_hook(change).remove)


@torch.no_grad()
def _round_differently(gradient: Tensor, generator: torch.Generator) -> None:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    if not values.numel():
        return
    signs = torch.randint(0, 2, values.shape, generator=generator).to(values) * 2 - 1
    # Elements that are exactly zero, such as those of embeddings that the batch does not use, have no rounding error.
    values.add_(signs * (values != 0) * (values.abs().max() * _ROUNDING))
