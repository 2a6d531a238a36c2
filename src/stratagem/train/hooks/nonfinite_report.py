"""Report NaN and Inf in a training step: iterations, ranks, values and samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from stratagem.distributed import all_gather_object
from stratagem.train.run.context import Run
from stratagem.utils.names import some_names
from stratagem.utils.scalars import as_scalar

__all__ = ["Batch", "NonFiniteReport"]


class Batch(NamedTuple):
    """An iteration whose step is checked: its position, and a reference to the outputs of its training step."""

    iteration: int
    epoch: int
    batch: int
    outputs: Any


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NonFiniteReport:
    """A report of NaN or Inf in one step, the same on every rank.

    Attributes:
        first: the first iteration, counted from 1, that contributed to the step.
        last: the last iteration that contributed to the step.
        epoch: the epoch of the last iteration, counted from 1.
        batch: the batch of the last iteration in its epoch, counted from 1.
        values: the outputs of the training step that are NaN or Inf, keyed by rank and name.
        samples: the dataset indices of the samples, keyed by rank; None if the order of the data is unknown.
        parameters: the names of the parameters whose synchronized gradients contain NaN or Inf, roughly from the loss to
            the inputs.
    """

    first: int
    last: int
    epoch: int
    batch: int
    values: Mapping[int, Mapping[str, float]]
    samples: Mapping[int, Sequence[int] | None]
    parameters: tuple[str, ...] = ()

    @classmethod
    def gather(cls, run: Run, batches: Sequence[Batch], parameters: tuple[str, ...]) -> NonFiniteReport:
        """Create the report for the iterations of one step from the outputs on all ranks. Collective."""
        here = [(batch, bad) for batch in batches if (bad := _nonfinite(batch.outputs))]
        # If all losses on this rank are finite, any of its batches can be the cause.
        suspects = [batch for batch, _ in here] or list(batches)
        values = {name: value for _, bad in here for name, value in bad.items()}
        gathered = all_gather_object((values, _samples(run, suspects)))
        last = batches[-1]
        return cls(
            first=batches[0].iteration + 1,
            last=last.iteration + 1,
            epoch=last.epoch + 1,
            batch=last.batch + 1,
            values={rank: values for rank, (values, _) in enumerate(gathered) if values},
            samples={rank: samples for rank, (_, samples) in enumerate(gathered)},
            parameters=parameters,
        )

    def describe(self) -> str:
        """Return the position, the values and the samples as sentences."""
        where = f"Iteration {self.last}" if self.first == self.last else f"Iterations {self.first} to {self.last}"
        place = f"{where} (epoch {self.epoch}, batch {self.batch})"
        return f"{place}: {self._what()} {self._which()}"

    def record(self) -> dict[str, Any]:
        """Return the record for the log."""
        values = {name: value for bad in self.values.values() for name, value in bad.items()}
        return {
            **values, "mode": "nonfinite", "epoch": self.epoch, "iter": self.last, "step": self.last,
            "ranks": sorted(self.values), "parameters": list(self.parameters),
            "samples": {str(rank): indices for rank, indices in self.samples.items()},
        }  # fmt: skip

    def _what(self) -> str:
        if self.values:
            shown = "; ".join(
                f"{', '.join(f'{name}={value}' for name, value in bad.items())} on rank {rank}"
                for rank, bad in self.values.items()
            )
            return f"the training step returned {shown}."
        if not self.parameters:
            return "the losses are finite, but the gradients contain NaN or Inf."
        shown = some_names(self.parameters)
        count = len(self.parameters)
        return f"the losses are finite, but the gradients of {count} parameter(s) contain NaN or Inf: {shown}."

    def _which(self) -> str:
        if all(indices is None for indices in self.samples.values()):
            return "The samples are unknown, because this dataloader chooses the order of the data itself."
        shown = "; ".join(f"rank {rank} {indices}" for rank, indices in self.samples.items())
        return f"Dataset indices of the samples in the batch: {shown}."


def _nonfinite(outputs: Any) -> dict[str, float]:
    """Return the scalars in the outputs of a training step that are NaN or Inf. Synchronizes with the device."""
    if not isinstance(outputs, Mapping):
        return {}
    numbers = {name: as_scalar(value) for name, value in outputs.items()}
    return {str(name): number for name, number in numbers.items() if number is not None and not math.isfinite(number)}


def _samples(run: Run, batches: Iterable[Batch]) -> list[int] | None:
    known: list[int] = []
    for batch in batches:
        if run.train_data is None or not run.train_data.positioned:
            return None
        known += run.train_data.indices_of(batch.epoch, batch.batch)
    return known
