"""Several optimizers in one run, each in its own wrapper, such as those of a generator and a discriminator."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, final

from torch import nn

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.utils.names import did_you_mean

__all__ = ["OptimWrapperDict"]


@final
class OptimWrapperDict:
    """A mapping of name to wrapper. A model's ``train_step`` uses each wrapper by its name.

    One iteration is one ``train_step``, however many optimizers it steps and however often; each wrapper counts its
    own micro-batches and updates.

    Raises:
        ConfigValueError: if there is no wrapper.
        ConfigTypeError: if an item is something else.
    """

    def __init__(self, **optim_wrappers: BaseOptimWrapper) -> None:
        if not optim_wrappers:
            raise ConfigValueError("OptimWrapperDict needs at least one name=wrapper.")
        for name, wrapper in optim_wrappers.items():
            if not isinstance(wrapper, BaseOptimWrapper):
                raise ConfigTypeError(f"{name}={wrapper!r} must be a built optimizer wrapper.")
        self.optim_wrappers = dict(optim_wrappers)

    def update_params(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a loss is for one of the optimizers."""
        raise self._ambiguous("update_params")

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a loss is for one of the optimizers."""
        raise self._ambiguous("backward")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: each optimizer has its own time to step."""
        raise self._ambiguous("step")

    def optim_context(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: each optimizer has its own precision and windows."""
        raise self._ambiguous("optim_context")

    def zero_grad(self, **kwargs: Any) -> None:
        """Forget the gradients of every optimizer."""
        for wrapper in self.optim_wrappers.values():
            wrapper.zero_grad(**kwargs)

    def train(self) -> None:
        """Let the parameters of every optimizer hold the weights that train."""
        for wrapper in self.optim_wrappers.values():
            wrapper.train()

    def eval(self) -> None:
        """Let the parameters of every optimizer hold the weights to evaluate and to save."""
        for wrapper in self.optim_wrappers.values():
            wrapper.eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the parameters of every optimizer hold the weights to evaluate for the length of a block."""
        with ExitStack() as stack:
            for wrapper in self.optim_wrappers.values():
                stack.enter_context(wrapper.evaluating())
            yield

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Say where the run stands to every wrapper; each counts one micro-batch an iteration."""
        for wrapper in self.optim_wrappers.values():
            wrapper.initialize_count_status(model, init_counts, max_counts)

    @property
    def pending(self) -> int:
        """How many micro-batches of unfinished windows wait for their update, over all wrappers."""
        return sum(wrapper.pending for wrapper in self.optim_wrappers.values())

    def drop_window(self) -> int:
        """Forget the unfinished window of every wrapper; return how many micro-batches they had in all."""
        return sum(wrapper.drop_window() for wrapper in self.optim_wrappers.values())

    @property
    def param_groups(self) -> dict[str, list[dict[str, Any]]]:
        """The groups of each optimizer by name."""
        return {name: wrapper.param_groups for name, wrapper in self.optim_wrappers.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of each optimizer by name."""
        return {name: wrapper.defaults for name, wrapper in self.optim_wrappers.items()}

    def get_lr(self) -> dict[str, list[float]]:
        """Return ``{"<name>.lr": [...]}`` for every optimizer."""
        return {f"{name}.{key}": values for name, one in self.items() for key, values in one.get_lr().items()}

    def get_momentum(self) -> dict[str, list[float]]:
        """Return ``{"<name>.momentum": [...]}`` for every optimizer."""
        return {f"{name}.{key}": values for name, one in self.items() for key, values in one.get_momentum().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return each wrapper's state by name."""
        return {name: wrapper.state_dict() for name, wrapper in self.optim_wrappers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore each wrapper by name; the argument stays as it is.

        Raises:
            CheckpointMismatchError: if the names differ.
        """
        if set(state_dict) != set(self.optim_wrappers):
            raise CheckpointMismatchError(
                f"The saved optimizers are {sorted(state_dict)}, those of this run {sorted(self.optim_wrappers)}. "
                "Build the same ones, or resume without the optimizer."
            )
        for name, state in state_dict.items():
            self.optim_wrappers[name].load_state_dict(state)

    def items(self) -> ItemsView[str, BaseOptimWrapper]:
        """Return the names with their wrappers."""
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
            raise ConfigKeyError(f"There is no optimizer {name!r}. {did_you_mean(name, self.optim_wrappers)}") from None

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
            f"{method} is of one optimizer, and there are several ({names}). Call it on one of them, as in "
            f'optim_wrapper["{next(iter(self.optim_wrappers))}"].{method}(...).'
        )
