"""Scheduler classes whose signature combines the fields of a settings dataclass with the common options."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim.schedules.base import ParamScheduler
from stratagem.optim.schedules.curves import Curve
from stratagem.utils.names import did_you_mean

__all__ = ["BoundScheduler", "CurveScheduler"]


class BoundScheduler(ParamScheduler, ABC):
    """A scheduler that accepts the fields of a dataclass and the arguments of ``ParamScheduler``.

    Subclasses pass the dataclass as ``settings`` and, if they only schedule one option, its name as ``key`` (they then have
    no argument ``param_name``). The signature is generated from both, so that help, configuration checks and error messages
    know every argument.
    """

    settings_type: ClassVar[type[Any]]
    settings: Any
    key: ClassVar[str | None] = None
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, *, settings: type[Any] | None = None, key: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if settings is None:
            return
        cls.settings_type = settings
        cls.key = key
        cls.counted_arguments = getattr(settings, "counted", ())
        shared = list(inspect.signature(ParamScheduler.__init__).parameters.values())[1:]
        given = [parameter for parameter in shared if parameter.name != "param_name" or key is None]
        head = [parameter for parameter in given if parameter.default is inspect.Parameter.empty]
        own = list(inspect.signature(settings).parameters.values())
        cls.__signature__ = inspect.Signature([*head, *own, *given[len(head) :]])

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            given = self.__signature__.bind(*args, **kwargs).arguments
        except TypeError as error:
            unknown = [name for name in kwargs if name not in self.__signature__.parameters]
            hint = did_you_mean(unknown[0], self.__signature__.parameters) if unknown else ""
            raise ConfigTypeError(f"{type(self).__name__}: {error}. {hint}".rstrip()) from None
        own = inspect.signature(self.settings_type).parameters
        self.settings = self.settings_type(**{name: value for name, value in given.items() if name in own})
        if self.key is not None:
            given["param_name"] = self.key
        per_group = {name: given[name] for name in getattr(self.settings_type, "per_group", ()) if name in given}
        _check_per_group(type(self).__name__, per_group, given["optimizer"])
        super().__init__(**{name: value for name, value in given.items() if name not in own})

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": dataclasses.asdict(self.settings)}

    def _restore_settings(self, description: Mapping[str, Any]) -> None:
        super()._restore_settings(description)
        self.settings = self.settings_type(**description["settings"])


def _check_per_group(scheduler: str, settings: Mapping[str, Any], optimizer: Any) -> None:
    """Check that each setting that is a list has a value for each parameter group.

    Raises:
        ConfigValueError: if the length of a list differs from the number of groups.
    """
    groups = len(getattr(optimizer, "param_groups", ()))
    for name, value in settings.items():
        if isinstance(value, list | tuple) and groups and len(value) != groups:
            raise ConfigValueError(
                f"{scheduler}: {name}={list(value)!r} has {len(value)} values, but the optimizer has {groups} parameter "
                f"groups. Specify one value per group, in the order of param_groups, or a single number, which each group "
                "scales by its own ratio, such as lr_mult."
            )


class CurveScheduler(BoundScheduler, ABC):
    """A scheduler that follows a curve."""

    settings: Curve
    # NaN compares unequal to every number, so the first computed shape counts as a change.
    _shape: float = math.nan

    def transform(self, value: float, initial: float) -> float:
        return self.settings.apply(self._shape, value, initial, 1.0, 0)

    def transform_group(self, value: float, initial: float, ratio: float, number: int) -> float:
        return self.settings.apply(self._shape, value, initial, ratio, number)

    def _update_shape(self) -> bool:
        shape = self.settings.at(self._in_range, self._span)
        changed = shape != self._shape
        self._shape = shape
        return changed
