"""Options of a runner that are checked when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stratagem.compat.mmengine.runner.loops import IterBasedTrainLoop
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.utils import did_you_mean, refuse_unknown

__all__ = ["loop_skips_batches", "require_complete", "uses_global_random_numbers"]

_ORDERS = ("stratagem", "mmengine")


def require_complete(**arguments: Any) -> None:
    """Require either all or none of the arguments of training, validation or testing.

    Raises:
        ValueError: if only some of them are given.
    """
    missing = [name for name, value in arguments.items() if value is None]
    if 0 < len(missing) < len(arguments):
        raise ConfigValueError(
            f"{', '.join(arguments)} should be either all None or not None, but {', '.join(missing)} is missing."
        )


def uses_global_random_numbers(section: Any) -> bool:
    """Return whether data loaders draw random numbers where those of MMEngine do, as the section ``stratagem`` specifies.

    Raises:
        ConfigTypeError: if the section is not a mapping.
        ConfigKeyError: if it contains an unknown key.
        ConfigValueError: if ``data_order`` is unknown.
    """
    if section is None:
        return False
    if not isinstance(section, Mapping):
        raise ConfigTypeError(f"stratagem must be a dict, got {section!r}.")
    refuse_unknown(section, ("data_order",), "stratagem")
    order = section.get("data_order", "stratagem")
    if order not in _ORDERS:
        raise ConfigValueError(f"stratagem: unknown data_order={order!r}. {did_you_mean(str(order), _ORDERS)}")
    return bool(order == "mmengine")


def loop_skips_batches(loop: Any) -> bool:
    """Return whether a training loop has a ``run`` method that skips the batches of earlier sessions, as MMEngine's does.

    Such a method calls ``next(self.dataloader_iterator)`` in a loop over ``range(self._iter)``. After a resume, its iterator
    begins at the first batch.
    """
    if not isinstance(loop, IterBasedTrainLoop) or type(loop).run is IterBasedTrainLoop.run:
        return False
    names = set(getattr(getattr(type(loop).run, "__code__", None), "co_names", ()))
    return {"range", "next", "dataloader_iterator"} <= names
