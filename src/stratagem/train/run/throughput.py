"""Count the samples, tokens and steps between two log lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import torch
from torch import Tensor
from torch.utils.data import default_collate

from stratagem.data import pseudo_collate
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim import OptimWrapperDict
from stratagem.train.run.context import Run

__all__ = ["CountSpec", "Rates", "Throughput", "parse_count"]

#: What to count in a batch: an entry (a key or an index), a function of the batch, False for nothing, None for the default.
CountSpec = str | int | Callable[[Any], Any] | Literal[False] | None
_Count = int | float | Tensor

_SAMPLES: Final = "stratagem/samples"
_TOKENS: Final = "stratagem/tokens"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The work of all data-parallel ranks between two log lines; None if it is unknown.

    Attributes:
        iterations: the number of iterations.
        seconds: their duration on this rank, including hooks and the time spent waiting for data.
        samples: the number of samples.
        tokens: the number of tokens.
        steps: the number of optimizer steps.
    """

    iterations: int
    seconds: float
    samples: float | None
    tokens: float | None
    steps: int | None

    def per_second(self) -> dict[str, float]:
        """Return the rates that are known, by their names in records."""
        counts = {"samples": self.samples, "tokens": self.tokens, "steps": self.steps}
        return {
            f"{name}_per_second": count / self.seconds
            for name, count in counts.items()
            if count is not None and self.seconds > 0
        }


def parse_count(owner: str, name: str, spec: Any) -> CountSpec:
    """Check an option that specifies what to count.

    Raises:
        ConfigTypeError: if it is neither a key, an index, a function, False nor None.
    """
    if spec is None or spec is False or (isinstance(spec, str | int) and spec is not True) or callable(spec):
        return spec  # type: ignore[no-any-return]  # checked above
    raise ConfigTypeError(
        f"{owner}: expected {name} to be the key or index of an entry of the batch, a function of the batch, False or None, got "
        f"{spec!r}."
    )


@final
class Throughput:
    """Counts the samples and tokens of this rank. Nothing is read from the device between two calls of :meth:`finish`.

    The number of samples is determined by the first of these that applies: the argument ``samples``; the method
    ``count_samples(batch)`` of the model; the sampler, if it determines the sizes of batches; the batch, if ``default_collate``
    or ``pseudo_collate`` formed it. The number of tokens is determined by the argument ``tokens``; the method
    ``count_tokens(batch)`` of the model; the entry ``input_ids`` of a mapping, without positions where ``attention_mask`` is 0.
    Otherwise, they are unknown.

    Args:
        run: a run that is about to train.
        samples: what to count as samples: the entry whose first dimension is their number, or a function that returns it.
        tokens: what to count as tokens: the entry whose elements (for a boolean entry, those that are True) are the tokens, or a
            function that returns their number, also as a tensor on the device.

    Attributes:
        observes_each: whether :meth:`observe` must be called with each batch.
        last_batch: the index of a batch with which it must be called otherwise; -1 if there is none.
    """

    def __init__(self, run: Run, *, samples: CountSpec = None, tokens: CountSpec = None) -> None:
        self._loader: Any = run.train_data
        model = run.strategy.unwrap_model()
        self._size: int | None = None
        self.last_batch = -1
        self._count_samples = _counter(samples, getattr(model, "count_samples", None), _first_dimension)
        self._count_tokens = _counter(tokens, getattr(model, "count_tokens", None), _num_tokens)
        if samples is None and self._count_samples is None:
            self._use_loader(run)
        # Whether a batch has tokens by default is known after the first one.
        self._tries_tokens = tokens is None and self._count_tokens is None
        self.observes_each = True
        self._samples: _Count = 0
        self._tokens: _Count = 0
        self._steps = _num_steps(run)

    def _use_loader(self, run: Run) -> None:
        loader = self._loader
        last = None if loader is None else loader.last_batch(run.epoch)
        if last is not None:
            self.last_batch, self._size = last[0], loader.batch_size
        elif loader is not None and loader.collate is default_collate:
            self._count_samples = _num_stacked
        elif loader is not None and loader.collate is pseudo_collate:
            self._count_samples = _num_listed
        else:
            run.logger.info(
                "samples/s is not logged, because the sizes of the batches are unknown. Define the method count_samples(batch) "
                "of the model, or set default_hooks=dict(logger=dict(samples=...)) to an entry of the batch, or to False."
            )

    def observe(self, epoch: int, batch_idx: int, batch: Any) -> None:
        """Count the samples and tokens of a batch."""
        if self._tries_tokens:
            self._tries_tokens = False
            self._count_tokens = _input_tokens if _input_tokens(batch) is not None else None
            self.observes_each = not (self._count_tokens is None and self._count_samples is None)
        if self._count_samples is not None:
            self._samples = _sum(self._samples, self._count_samples(batch))
        elif batch_idx == self.last_batch and self._size is not None:
            # All batches are counted with the same size when the samples are read.
            self._samples += self._loader.last_batch(epoch)[1] - self._size
        if self._count_tokens is not None:
            self._tokens = _sum(self._tokens, self._count_tokens(batch))

    def counts(self, iterations: int) -> dict[str, float]:
        """Return the counts of this rank since the last :meth:`finish`, to be averaged over the ranks; NaN if unknown."""
        known = self._count_samples is not None or self._size is not None
        samples = float(self._samples) + iterations * (self._size or 0) if known else math.nan
        tokens = math.nan if self._count_tokens is None else float(self._tokens)
        return {_SAMPLES: samples, _TOKENS: tokens}

    def finish(self, means: dict[str, float], run: Run, *, iterations: int, seconds: float) -> Rates:
        """Remove the counts from the values that were averaged over the ranks, and begin to count again.

        Args:
            means: values that include those of :meth:`counts`.
            run: the run.
            iterations: the number of iterations since the last call.
            seconds: their duration.
        """
        # Ranks of one tensor-parallel or pipeline group process the same batch, so the mean over all ranks is that over the
        # data-parallel ranks.
        totals = [means.pop(name) * run.strategy.dp_size for name in (_SAMPLES, _TOKENS)]
        samples, tokens = (None if math.isnan(total) else float(round(total)) for total in totals)
        before, self._steps = self._steps, _num_steps(run)
        self._samples = self._tokens = 0
        return Rates(
            iterations=iterations,
            seconds=seconds,
            samples=samples,
            tokens=tokens,
            steps=None if before is None or self._steps is None else self._steps - before,
        )


def _num_steps(run: Run) -> int | None:
    """Return the number of optimizer steps; None if there are several optimizers."""
    optim = run.optim_wrapper
    return None if isinstance(optim, OptimWrapperDict) else optim.num_steps_applied


def _sum(total: _Count, count: _Count | None) -> _Count:
    return math.nan if count is None else total + count


def _counter(
    spec: CountSpec, of_model: Any, count: Callable[[Tensor], _Count]
) -> Callable[[Any], _Count | None] | None:
    """Return the function that an option or the model specifies; None if neither does."""
    if spec is False:
        return None
    if spec is None:
        return of_model if callable(of_model) else None
    if callable(spec):
        return spec
    return lambda batch: count(_entry(batch, spec))


def _entry(batch: Any, key: str | int) -> Tensor:
    try:
        value = batch[key]
    except (KeyError, IndexError, TypeError) as error:
        known = (
            f"the keys {', '.join(map(str, batch))}"
            if isinstance(batch, Mapping)
            else f"the type {type(batch).__name__}"
        )
        raise ConfigValueError(f"LoggerHook: the batch has no entry {key!r} to count; it has {known}.") from error
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _first_dimension(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _num_tokens(tensor: Tensor) -> _Count:
    return tensor.sum() if tensor.dtype == torch.bool else tensor.numel()


def _input_tokens(batch: Any) -> _Count | None:
    """Return the number of tokens in ``input_ids``; None if a batch has none."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        return (mask != 0).sum()
    return tokens.numel()


def _num_stacked(batch: Any) -> int | None:
    """Return the number of samples of a batch from ``default_collate``; None if it contains no tensors and no strings."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, Mapping):
        return next((count for count in map(_num_stacked, batch.values()) if count is not None), None)
    if not isinstance(batch, Sequence) or isinstance(batch, str | bytes):
        return None
    if batch and isinstance(batch[0], str | bytes):
        return len(batch)
    return next((count for count in map(_num_stacked, batch) if count is not None), None)


def _num_listed(batch: Any) -> int | None:
    """Return the number of samples of a batch from ``pseudo_collate``, which contains a list of values for each field."""
    if isinstance(batch, Mapping):
        return next((count for count in map(_num_listed, batch.values()) if count is not None), None)
    if not isinstance(batch, list | tuple) or not batch:
        return None
    return _num_listed(batch[0]) if isinstance(batch[0], list | tuple | Mapping) else len(batch)
