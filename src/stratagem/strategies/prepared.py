"""The results of ``prepare``: the attributes that it sets, and its return value."""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar, final, overload

from torch import nn

from stratagem.errors import NotPreparedError
from stratagem.parallel import AnyOptim
from stratagem.strategies.state.resuming import Schedulers

__all__ = ["Prepared", "PreparedComponents"]

T = TypeVar("T")


@final
class Prepared(Generic[T]):
    """An attribute that ``prepare`` sets. Reading it earlier raises a :class:`NotPreparedError` that contains ``hint``."""

    def __init__(self, hint: str) -> None:
        self._hint = hint
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Prepared[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self
        try:
            return instance.__dict__[self._name]
        except KeyError:
            raise NotPreparedError(f"{owner.__name__} has no {self._name} yet. {self._hint}") from None

    def __set__(self, instance: object, value: T) -> None:
        instance.__dict__[self._name] = value

    def get(self, instance: object) -> T | None:
        """Return the value, or None before it is set."""
        return instance.__dict__.get(self._name)

    def clear(self, instance: object) -> None:
        """Remove the value."""
        instance.__dict__.pop(self._name, None)


@final
class PreparedComponents(list[Any]):
    """The components that a strategy prepared: a list that unpacks in the order model, optimizer wrapper, schedulers.

    The schedulers are an item of the list only if they were prepared.

    Attributes:
        model: the placed model.
        optim_wrapper: its optimizer wrapper, or an ``OptimWrapperDict`` for several optimizers.
        param_schedulers: the parameter schedulers; None if none were prepared.
    """

    def __init__(self, model: nn.Module, optim_wrapper: AnyOptim, param_schedulers: Schedulers | None) -> None:
        super().__init__([model, optim_wrapper, *([] if param_schedulers is None else [param_schedulers])])
        self.model: Final = model
        self.optim_wrapper: Final = optim_wrapper
        self.param_schedulers: Final = param_schedulers
