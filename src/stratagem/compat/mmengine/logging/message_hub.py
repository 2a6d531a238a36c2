"""The message hub: scalars and facts of a run, which all of its parts can read and write."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.logging.history_buffer import HistoryBuffer
from stratagem.compat.mmengine.logging.logger import print_log
from stratagem.compat.mmengine.utils.manager import ManagerMixin
from stratagem.errors import ConfigKeyError, ConfigTypeError

__all__ = ["MessageHub"]

_STATE_KEYS = ("log_scalars", "runtime_info", "resumed_keys")
# The types whose values are exact in float32.
_READ_LATER = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PENDING = 4096


class MessageHub(ManagerMixin):
    """Histories of scalars and facts of a run, by name.

    Values on accelerators are copied to the host when the histories are read, all at once: copying each one when it is
    added would let the host wait for the device in every iteration.

    Args:
        name: the name of the instance.
        log_scalars: histories.
        runtime_info: facts, of any type.
        resumed_keys: for names of histories and facts, whether checkpoints contain them.

    Raises:
        AssertionError: if a scalar is not a ``HistoryBuffer``, or a resumed key is not a name of a scalar or fact.
        TypeError: if an argument is not a dict.
    """

    def __init__(
        self,
        name: str,
        log_scalars: dict[str, HistoryBuffer] | None = None,
        runtime_info: dict[str, Any] | None = None,
        resumed_keys: dict[str, bool] | None = None,
    ) -> None:
        super().__init__(name)
        self._log_scalars: OrderedDict[str, HistoryBuffer] = _parse("log_scalars", log_scalars)
        self._runtime_info: OrderedDict[str, Any] = _parse("runtime_info", runtime_info)
        self._resumed_keys: OrderedDict[str, bool] = _parse("resumed_keys", resumed_keys)
        # Values and counts of scalars that are still on an accelerator, in order.
        self._pending: dict[str, list[tuple[torch.Tensor, int]]] = {}
        for key, value in self._log_scalars.items():
            require(isinstance(value, HistoryBuffer), f"log_scalars[{key!r}] must be a HistoryBuffer, got {value!r}.")
        for key in self._resumed_keys:
            require(
                key in self._log_scalars or key in self._runtime_info,
                f"resumed_keys contains {key!r}, which is neither in log_scalars nor in runtime_info.",
            )

    @classmethod
    def get_current_instance(cls) -> MessageHub:
        """Return the instance that was created last; create one called ``"mmengine"`` if there is none."""
        if not cls._instance_dict:
            cls.get_instance("mmengine")
        hub: MessageHub = super().get_current_instance()
        return hub

    def update_scalar(self, key: str, value: Any, count: int = 1, resumed: bool = True) -> None:
        """Append a value to the history of a scalar.

        Args:
            key: the name of the scalar.
            value: a number, or a tensor or array with one element.
            count: how many values it sums up.
            resumed: whether checkpoints contain the history.

        Raises:
            AssertionError: if the value has several elements, the count is not an integer, or ``resumed`` is not the same as
                before.
        """
        self._set_resumed_keys(key, resumed)
        if type(count) is not int and not isinstance(count, int):
            raise InvalidArgumentError(f"The count of {key!r} must be an integer, got {count!r}.")
        if type(value) is not float and _can_wait(value):
            self._add_pending(key, value, count)
            return
        number = value if type(value) is float else self._get_valid_value(value)
        if key in self._log_scalars:
            if self._pending:
                self._read_pending(key)
            self._log_scalars[key].update(number, count)
        else:
            self._log_scalars[key] = HistoryBuffer([number], [count])

    def _add_pending(self, key: str, value: torch.Tensor, count: int) -> None:
        """Add a value that stays on its device until it is read."""
        self._log_scalars.setdefault(key, HistoryBuffer())
        # A compiled model may write its next results to the same memory.
        self._pending.setdefault(key, []).append((value.detach().clone().reshape(()), count))
        if len(self._pending[key]) >= _MOST_PENDING:
            self._read_pending(*list(self._pending))

    def _read_pending(self, *keys: str) -> None:
        """Append the pending values of scalars to their histories, with one copy per device."""
        pending = [(key, value, count) for key in keys for value, count in self._pending.pop(key, ())]
        for device in {value.device for _, value, _ in pending}:
            there = [(key, value, count) for key, value, count in pending if value.device == device]
            numbers = torch.stack([value.float() for _, value, _ in there]).tolist()
            for (key, _, count), number in zip(there, numbers, strict=True):
                self._log_scalars[key].update(number, count)

    def update_scalars(self, log_dict: dict[str, Any], resumed: bool = True) -> None:
        """Append values to the histories of several scalars; a value may be ``dict(value=..., count=...)``.

        Raises:
            AssertionError: if ``log_dict`` is not a dict, or a dict in it has no ``value``; see also :meth:`update_scalar`.
        """
        # The messages contain tensors, which take long to write, and are only needed for an error.
        if not isinstance(log_dict, dict):
            raise InvalidArgumentError(f"log_dict must be a dict, got {log_dict!r}.")
        for key, given in log_dict.items():
            value, count = given, 1
            if isinstance(given, dict):
                if "value" not in given:
                    raise InvalidArgumentError(f"The entry {key!r} has no key 'value': {given!r}.")
                value, count = given["value"], self._get_valid_value(given.get("count", 1))
            self.update_scalar(key, value, count, resumed)

    def update_info(self, key: str, value: Any, resumed: bool = True) -> None:
        """Set a fact.

        Raises:
            AssertionError: if ``resumed`` is not the same as before.
        """
        self._set_resumed_keys(key, resumed)
        self._runtime_info[key] = value

    def update_info_dict(self, info_dict: dict[str, Any], resumed: bool = True) -> None:
        """Set several facts.

        Raises:
            AssertionError: if ``info_dict`` is not a dict; see also :meth:`update_info`.
        """
        if not isinstance(info_dict, dict):
            raise InvalidArgumentError(f"info_dict must be a dict, got {info_dict!r}.")
        for key, value in info_dict.items():
            self.update_info(key, value, resumed=resumed)

    def pop_info(self, key: str, default: Any = None) -> Any:
        """Remove a fact and return it, or ``default`` if it is unknown."""
        return self._runtime_info.pop(key, default)

    def get_scalar(self, key: str) -> HistoryBuffer:
        """Return the history of a scalar; it is not a copy.

        Raises:
            KeyError: if there is none.
        """
        if key not in self._log_scalars:
            raise ConfigKeyError(
                f"The message hub {self.instance_name!r} has no scalar {key!r}. It has: {', '.join(self._log_scalars)}."
            )
        if self._pending:
            self._read_pending(key)
        return self._log_scalars[key]

    def get_info(self, key: str, default: Any = None) -> Any:
        """Return a fact, or ``default`` if it is unknown."""
        return self._runtime_info.get(key, default)

    @property
    def log_scalars(self) -> OrderedDict[str, HistoryBuffer]:
        """The histories by name."""
        self._read_pending(*list(self._pending))
        return self._log_scalars

    @property
    def runtime_info(self) -> OrderedDict[str, Any]:
        """The facts by name."""
        return self._runtime_info

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the histories and facts that checkpoints contain, and ``resumed_keys``."""
        scalars = OrderedDict(
            (key, copy.deepcopy(value)) for key, value in self.log_scalars.items() if self._is_kept(key)
        )
        facts = OrderedDict(
            (key, _copied(key, value)) for key, value in self._runtime_info.items() if self._is_kept(key)
        )
        return {"log_scalars": scalars, "runtime_info": facts, "resumed_keys": self._resumed_keys}

    def load_state_dict(self, state_dict: MessageHub | dict[str, Any]) -> None:
        """Restore histories and facts; those that the state does not have keep their values.

        Args:
            state_dict: the result of :meth:`state_dict`, or another message hub, of which everything is copied.

        Raises:
            AssertionError: if a part of the state is missing.
        """
        self._pending.clear()
        if not isinstance(state_dict, dict):
            self._log_scalars = copy.deepcopy(state_dict.log_scalars)
            self._runtime_info = copy.deepcopy(state_dict._runtime_info)
            self._resumed_keys = copy.deepcopy(state_dict._resumed_keys)
            return
        for part in _STATE_KEYS:
            require(part in state_dict, f"The state of the message hub has no {part!r}; it has {sorted(state_dict)}.")
        for key, value in state_dict["log_scalars"].items():
            if isinstance(value, HistoryBuffer):
                self._log_scalars[key] = value
            else:
                _warn(f"The scalar {key!r} in the state of the message hub is not a HistoryBuffer and is skipped.")
        for key, value in state_dict["runtime_info"].items():
            self._runtime_info[key] = _copied(key, value)
        for key, value in state_dict["resumed_keys"].items():
            if key not in self._log_scalars and key not in self._runtime_info:
                _warn(f"The state of the message hub has no value for its key {key!r}, which is skipped.")
                continue
            if not value:
                _warn(
                    f"{key!r} was loaded, but its entry in resumed_keys is False: later checkpoints do not contain it."
                )
            self._resumed_keys[key] = value

    def _is_kept(self, key: str) -> bool:
        return self._resumed_keys.get(key, False)

    def _set_resumed_keys(self, key: str, resumed: bool) -> None:
        keys = self._resumed_keys
        if key not in keys:
            keys[key] = resumed
        elif keys[key] != resumed:
            before = keys[key]
            raise InvalidArgumentError(
                f"{key!r} was updated with resumed={before} before, and with resumed={resumed} now. Use the same value."
            )

    def _get_valid_value(self, value: Any) -> Any:
        """Return a number for a number, or for an array or tensor with one element."""
        if isinstance(value, int | float):
            return value
        size = (
            value.size if isinstance(value, np.ndarray | np.number) else value.numel() if hasattr(value, "numel") else 0
        )
        if size != 1:
            raise InvalidArgumentError(
                f"A scalar must be a number, or a tensor or array with one element, got {value!r}."
            )
        return value.item()


def _parse(name: str, value: Any) -> OrderedDict[str, Any]:
    if not (value is None or isinstance(value, dict)):
        raise ConfigTypeError(f"{name} must be a dict or None, got {value!r} ({type(value).__name__}).")
    return OrderedDict(value or {})


def _can_wait(value: Any) -> bool:
    """Return whether a value is on an accelerator, so that reading it now would wait for the device."""
    return (
        type(value) is torch.Tensor and value.device.type != "cpu" and value.numel() == 1 and value.dtype in _READ_LATER
    )


def _copied(key: str, value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 -- any object can be a fact, and its copying can raise anything
        _warn(f"{key!r} in the message hub cannot be copied; the state refers to the object itself.")
        return value


def _warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)
