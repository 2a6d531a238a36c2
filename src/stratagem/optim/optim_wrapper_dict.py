"""Several optimizers with separate wrappers, such as the optimizers of a generator and a discriminator."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

from torch import nn

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.utils.names import did_you_mean

__all__ = ["OptimWrapperDict"]


class OptimWrapperDict:
    """A mapping from names to wrappers. A model's ``train_step`` accesses each wrapper by its name.

    One iteration is one ``train_step``, regardless of the number of optimizer steps in it. Each wrapper counts its
    own micro-batches and updates.

    Raises:
        ConfigValueError: if no wrapper is given.
        ConfigTypeError: if a value is not an optimizer wrapper.
    """

    def __init__(self, **optim_wrappers: BaseOptimWrapper) -> None:
        if not optim_wrappers:
            raise ConfigValueError(
                "OptimWrapperDict requires at least one optimizer wrapper: OptimWrapperDict(name=wrapper)."
            )
        for name, wrapper in optim_wrappers.items():
            if not isinstance(wrapper, BaseOptimWrapper):
                raise ConfigTypeError(f"{name}={wrapper!r} must be a built optimizer wrapper.")
        self.optim_wrappers = dict(optim_wrappers)

    def update_params(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error, because a loss belongs to one of the optimizers."""
        raise self._ambiguous("update_params")

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error, because a loss belongs to one of the optimizers."""
        raise self._ambiguous("backward")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error, because each optimizer must be stepped separately."""
        raise self._ambiguous("step")

    def optim_context(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error, because each optimizer has a separate precision and accumulation."""
        raise self._ambiguous("optim_context")

    def zero_grad(self, **kwargs: Any) -> None:
        """Discard the gradients of all optimizers."""
        for wrapper in self.optim_wrappers.values():
            wrapper.zero_grad(**kwargs)

    def train(self) -> None:
        """Switch the parameters of all optimizers to the training weights."""
        for wrapper in self.optim_wrappers.values():
            wrapper.train()

    def eval(self) -> None:
        """Switch the parameters of all optimizers to the evaluation weights, which are also saved."""
        for wrapper in self.optim_wrappers.values():
            wrapper.eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch the parameters of all optimizers to the evaluation weights inside a ``with`` block."""
        with ExitStack() as stack:
            for wrapper in self.optim_wrappers.values():
                stack.enter_context(wrapper.evaluating())
            yield

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Set the counts of all wrappers; each counts one micro-batch per iteration."""
        for wrapper in self.optim_wrappers.values():
            wrapper.initialize_count_status(model, init_counts, max_counts)

    @property
    def pending_micro_batches(self) -> int:
        """The total number of micro-batches in the incomplete accumulation windows of all wrappers."""
        return sum(wrapper.pending_micro_batches for wrapper in self.optim_wrappers.values())

    def discard_accumulation(self) -> int:
        """Discard the incomplete accumulation window of each wrapper; return the total number of discarded micro-batches."""
        return sum(wrapper.discard_accumulation() for wrapper in self.optim_wrappers.values())

    @property
    def param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """A mapping from optimizer names to parameter groups."""
        return {name: wrapper.param_groups for name, wrapper in self.optim_wrappers.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        """A mapping from optimizer names to default options."""
        return {name: wrapper.defaults for name, wrapper in self.optim_wrappers.items()}

    def get_lr(self) -> dict[str, list[float]]:
        """Return ``{"<name>.lr": [...]}`` for every optimizer."""
        return {f"{name}.{key}": values for name, one in self.items() for key, values in one.get_lr().items()}

    def get_momentum(self) -> dict[str, list[float]]:
        """Return ``{"<name>.momentum": [...]}`` for every optimizer."""
        return {f"{name}.{key}": values for name, one in self.items() for key, values in one.get_momentum().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return a mapping from wrapper names to their states."""
        return {name: wrapper.state_dict() for name, wrapper in self.optim_wrappers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of each wrapper. The argument is not modified.

        Raises:
            CheckpointMismatchError: if the names differ.
        """
        if set(state_dict) != set(self.optim_wrappers):
            raise CheckpointMismatchError(
                f"The checkpoint has optimizers {sorted(state_dict)}, but this run has {sorted(self.optim_wrappers)}. "
                "Use the same names, or resume without the optimizer."
            )
        for name, state in state_dict.items():
            self.optim_wrappers[name].load_state_dict(state)

    def each(self) -> Mapping[str, BaseOptimWrapper]:
        """Return a mapping from names to wrappers; a single wrapper returns ``{"": self}``."""
        return self.optim_wrappers

    def items(self) -> ItemsView[str, BaseOptimWrapper]:
        """Return the pairs of names and wrappers."""
        return self.optim_wrappers.items()

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self.optim_wrappers.keys()

    def values(self) -> ValuesView[BaseOptimWrapper]:
        """Return the wrappers."""
        return self.optim_wrappers.values()

    def __getitem__(self, name: str) -> BaseOptimWrapper:
        try:
            return self.optim_wrappers[name]
        except KeyError:
            raise ConfigKeyError(
                f"OptimWrapperDict has no optimizer {name!r}. {did_you_mean(name, self.optim_wrappers)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self.optim_wrappers

    def __iter__(self) -> Iterator[str]:
        return iter(self.optim_wrappers)

    def __len__(self) -> int:
        return len(self.optim_wrappers)

    def __repr__(self) -> str:
        lines = "".join(f"\n  {name}: {wrapper!r}" for name, wrapper in self.optim_wrappers.items())
        return f"{type(self).__name__}({lines}\n)"

    def _ambiguous(self, method: str) -> NotImplementedError:
        names = ", ".join(self.optim_wrappers)
        return NotImplementedError(
            f"OptimWrapperDict has no {method}(): there are several optimizers ({names}). Call it on one of them, as in "
            f'optim_wrapper["{next(iter(self.optim_wrappers))}"].{method}(...).'
        )
