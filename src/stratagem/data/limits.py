"""Limits of the number of batches of an epoch or an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

from stratagem.errors import ConfigTypeError, ConfigValueError, TrainingError

__all__ = ["BatchLimit", "BatchLimits"]

_MODES = ("train", "val", "test")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimit:
    """The limit of one dataloader.

    Attributes:
        option: the option that set the limit, for messages.
        value: the number of batches on each rank, or the fraction of the batches of an epoch.
        exact: whether data of unknown length must have this number of batches. Otherwise, the length remains unknown.
        first_epoch: whether every epoch has the batches of the first epoch.
    """

    option: str
    value: int | float
    exact: bool = False
    first_epoch: bool = False

    def count(self, length: int | None) -> int:
        """Return the number of batches, given the number without the limit, which is None if it is unknown.

        Raises:
            ConfigValueError: if a fraction of an unknown number is requested, or the data has too few batches.
        """
        if isinstance(self.value, float):
            if length is None:
                raise ConfigValueError(
                    f"{self} is a fraction, but the number of batches is unknown, because the data has no length. Specify "
                    "a number of batches instead."
                )
            # In decimal arithmetic, because 0.29 * 100 is less than 29 in binary.
            return min(length, max(1, math.floor(length * Fraction(str(self.value)))))
        if length is not None and self.first_epoch and self.value > length:
            raise ConfigValueError(f"{self}, but each rank has {length} training batches. Set it to at most {length}.")
        return self.value if length is None else min(self.value, length)

    def describe(self, length: int | None) -> str:
        """Return a phrase about the effect of the limit on data of a given length."""
        count = self.count(length)
        total = "" if length is None else f" of {length:,}"
        which = "the first " if self.first_epoch else ""
        return f"{which}{count:,}{total} batches per rank ({self})"

    def cut(self, batches: Iterator[Any], done: int, length: int | None) -> Iterator[Any]:
        """Yield the batches up to the limit, given those that are already consumed, and close the iterator.

        Raises:
            TrainingError: if the data, whose length is unknown, ends earlier, and the limit must be exact.
        """
        count = self.count(length)
        try:
            while done < count:
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                done += 1
                yield batch
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        if done < count and length is None and self.exact:
            raise TrainingError(
                f"{self}, but the data ended after {done} batches. Its length is unknown, so the limit is used as the length of "
                f"an epoch. Set {self.option} to at most {done}."
            )

    def __str__(self) -> str:
        return f"{self.option}={self.value}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """The limits of a run.

    Attributes:
        limit_train_batches: the number of training batches per epoch on each rank (an integer), or their fraction (a float).
        limit_val_batches: the same for each validation set.
        limit_test_batches: the same for each test set.
        overfit_batches: the number of training batches that are used in every epoch and for the validation.

    Raises:
        ConfigTypeError: if a limit is not a number.
        ConfigValueError: if a limit is out of range, or the limits conflict.
    """

    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    overfit_batches: int | None = None

    def __post_init__(self) -> None:
        for mode in _MODES:
            _require_limit(f"limit_{mode}_batches", getattr(self, f"limit_{mode}_batches"))
        overfit = self.overfit_batches
        if overfit is None:
            return
        if isinstance(overfit, bool) or not isinstance(overfit, int):
            raise ConfigTypeError(f"overfit_batches must be a number of batches, got {overfit!r}.")
        if overfit < 1:
            raise ConfigValueError(f"overfit_batches must be at least 1, got {overfit}. Omit it to use all batches.")
        for mode in ("train", "val"):
            if getattr(self, f"limit_{mode}_batches") is not None:
                raise ConfigValueError(
                    f"overfit_batches={overfit} determines the batches of training and validation, so limit_{mode}_batches="
                    f"{getattr(self, f'limit_{mode}_batches')!r} would be ignored. Remove one of the two."
                )

    def of(self, mode: str) -> BatchLimit | None:
        """Return the limit for training (``"train"``), validation (``"val"``) or testing (``"test"``)."""
        if self.overfit_batches is not None and mode != "test":
            return BatchLimit(option="overfit_batches", value=self.overfit_batches, exact=True, first_epoch=True)
        option = f"limit_{mode}_batches"
        value = getattr(self, option)
        return None if value is None else BatchLimit(option=option, value=value, exact=mode == "train")

    def require_data(self, mode: str, *, given: bool) -> None:
        """Check that the data of a mode is specified if it is limited.

        Raises:
            ConfigValueError: if it is not.
        """
        option = "overfit_batches" if mode == "train" and self.overfit_batches is not None else f"limit_{mode}_batches"
        if getattr(self, option) is not None and not given:
            raise ConfigValueError(
                f"{option}={getattr(self, option)!r} has no effect without {mode}_dataloader. Remove it or add the data."
            )


def _require_limit(option: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigTypeError(
            f"{option} must be a number of batches (an integer) or a fraction of them (a float), got {value!r}."
        )
    if isinstance(value, int) and value < 1:
        raise ConfigValueError(
            f"{option} must be at least 1, got {value}. Omit the option to use all batches; to disable an evaluation, omit its "
            "dataloader, its evaluator and its arguments."
        )
    if isinstance(value, float) and not 0 < value <= 1:
        raise ConfigValueError(
            f"{option}={value} is a fraction, which must be greater than 0 and at most 1. Specify a number of batches as an "
            "integer."
        )
