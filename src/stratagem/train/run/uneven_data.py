"""End an epoch after the same iteration on every rank, even if the ranks have different numbers of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, final

from stratagem.data import EpochLoader
from stratagem.distributed import AsyncMaxReduce, all_gather_object, get_rank, get_world_size
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.train.run.context import Run
from stratagem.train.run.device_batches import device_batches
from stratagem.utils.names import did_you_mean

__all__ = ["TrainBatches", "UnevenData", "require_uneven_data"]

UnevenData = Literal["error", "shortest"]
_POLICIES = ("error", "shortest")
_END = object()
_ADVICE = (
    "All ranks run each iteration together. Give every rank the same number of batches, let the dataloader split the data "
    "among the ranks, or set uneven_data='shortest' in train_cfg to end the epoch on all ranks when the first rank runs out "
    "of data."
)


def require_uneven_data(uneven_data: str) -> None:
    """Check the option ``uneven_data`` of a training loop.

    Raises:
        ConfigValueError: if it is unknown.
    """
    if uneven_data not in _POLICIES:
        raise ConfigValueError(
            f"train_cfg: unknown uneven_data={uneven_data!r}. {did_you_mean(str(uneven_data), _POLICIES)}"
        )


@final
class TrainBatches:
    """The training batches of one epoch after another, the same number on every rank.

    The built-in samplers yield the same number of batches on every rank. For other data, the ranks check before each iteration
    whether all of them have a batch. Without this check, a rank would wait for the others in the backward pass until the timeout.

    Creating an instance is collective. Iterating over an epoch is collective if :attr:`checks` is True.

    Args:
        run: the run, for its log.
        loader: the training data of this rank.
        uneven_data: what to do if a rank has fewer batches than others: ``"error"`` raises an error on all ranks, and
            ``"shortest"`` ends the epoch on all ranks.

    Attributes:
        loader: the training data; may be replaced by a loader of the same data with a different seed.
        length: the number of batches per epoch, the same on every rank; None if it is unknown.
        slack: the maximum number of batches beyond ``length``.
        checks: whether the ranks check before each iteration that all of them have a batch.

    Raises:
        ConfigValueError: if ``uneven_data`` is unknown, or is ``"error"`` and the ranks have different numbers of batches.
    """

    def __init__(self, run: Run, loader: EpochLoader, uneven_data: UnevenData) -> None:
        require_uneven_data(uneven_data)
        self._run = run
        self.loader = loader
        self._policy = uneven_data
        self._has_reported = False
        self.length, self.slack = loader.length, loader.slack
        self.checks = get_world_size() > 1 and not all(all_gather_object(loader.is_even))
        if self.checks:
            self._some_ended = AsyncMaxReduce()
            self._agree_on_length()

    def epoch(self, epoch: int, done: int = 0) -> Iterator[Any]:
        """Iterate over an epoch, starting after its first ``done`` batches, on the device if the loader reads ahead.

        Raises:
            TrainingError: if a rank runs out of batches before the others, and ``uneven_data="error"``.
        """
        batches = device_batches(self._run, self.loader, self.loader.batches(epoch, done))
        return self._checked(batches, epoch, done) if self.checks else batches

    def _checked(self, batches: Iterator[Any], epoch: int, num_batches: int) -> Iterator[Any]:
        while True:
            batch = next(batches, _END)
            self._some_ended.start(int(batch is _END))
            if self._some_ended.wait():
                self._end_of_epoch(epoch, num_batches, ended=batch is _END)
                return
            num_batches += 1
            yield batch

    def _end_of_epoch(self, epoch: int, num_batches: int, *, ended: bool) -> None:
        ranks = all_gather_object(ended)
        if all(ranks):
            return
        out = ", ".join(str(rank) for rank, has_ended in enumerate(ranks) if has_ended)
        left = ", ".join(str(rank) for rank, has_ended in enumerate(ranks) if not has_ended)
        what = f"Epoch {epoch + 1}: rank {out} ran out of training data after {num_batches:,} batches, but rank {left} has more."
        if self._policy == "error":
            raise TrainingError(f"{what} {_ADVICE}")
        if get_rank() == 0 and not self._has_reported:
            self._run.logger.info("%s The epoch ends on all ranks (uneven_data='shortest').", what)
            self._has_reported = True

    def _agree_on_length(self) -> None:
        ranks = all_gather_object((self.length, self.slack))
        lengths = [length for length, _ in ranks]
        self.slack = max(slack for _, slack in ranks)
        known = [length for length in lengths if length is not None]
        self.length = min(known) if len(known) == len(lengths) else None
        if self._policy == "error" and len(set(known)) > 1:
            numbers = ", ".join(f"rank {rank}: {length}" for rank, length in enumerate(lengths))
            raise ConfigValueError(
                f"The ranks have different numbers of training batches per epoch ({numbers}). {_ADVICE}"
            )
