"""Run a model on data and return its results in the order of the data, under any strategy."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, final

import torch

from stratagem.data import EpochLoader
from stratagem.distributed import RankGroup, all_gather_object, gather_object
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.model import predict_step_of
from stratagem.storage.temporary import temporary_path
from stratagem.train.evaluation.precision import evaluation_dtype, in_precision
from stratagem.train.evaluation.uneven_inputs import pad_forward_passes
from stratagem.train.prediction.files import write_predictions
from stratagem.train.prediction.samples import check_samples, split_samples, to_host
from stratagem.train.run.context import Run
from stratagem.train.tools.preserve_state import isolate_rng

__all__ = ["predict_to_file", "predict_to_list"]

_END = object()
# The outputs for a batch on the CPU, and the number of its samples; None if the batch is a single item of the data.
_Outputs = tuple[Any, int | None]


def predict_to_list(run: Run, loader: EpochLoader, *, fp16: bool | None = None) -> list[Any] | None:
    """Return the results of all samples in the order of the data on rank 0, and None on the other ranks. Collective.

    Args:
        run: the run, whose strategy is prepared.
        loader: the data.
        fp16: see :func:`~stratagem.train.evaluation.precision.evaluation_dtype`.

    Raises:
        TrainingError: if an output does not have one part for each sample.
        ConfigValueError: if the data is already split across the ranks, so that its order is unknown.
    """
    own: list[_Outputs] = []
    _predict(run, loader, own.append, fp16)
    parts = gather_object((run.strategy.dp_rank, own))
    if parts is None:
        return None
    # Ranks in the same tensor-parallel group have the same results.
    by_dp_rank = dict(reversed(parts))
    return list(_merged([by_dp_rank[rank] for rank in sorted(by_dp_rank)], by_batch=loader.by_batch))


def predict_to_file(run: Run, loader: EpochLoader, path: Path, *, fp16: bool | None = None) -> int:
    """Write the results of all samples to a file in the order of the data; return their number. Collective.

    Each rank writes its results to a temporary file next to ``path``, and rank 0 merges them, so that a rank holds the results of
    only one batch at a time. ``path`` must therefore be in a folder that all ranks share.

    Raises:
        TrainingError: if an output does not have one part for each sample, or does not fit the format of the file.
        ConfigValueError: if the data is already split across the ranks, or the ranks do not share the folder.
    """
    group = RankGroup.of()
    dp_ranks = all_gather_object(run.strategy.dp_rank)
    folder = group.run_on_rank0(lambda: _make_folder(path))
    try:
        # Ranks in the same tensor-parallel group have the same results.
        if dp_ranks.index(run.strategy.dp_rank) == run.rank:
            with _open_part(folder, run.strategy.dp_rank) as file:
                writer = _PartWriter(file)
                _predict(run, loader, writer.append, fp16)
        else:
            _predict(run, loader, _discard, fp16)
        # Wait until all ranks have written their results.
        group.gather(None)
        parts = [folder / str(rank) for rank in sorted(set(dp_ranks))]
        return group.run_on_rank0(lambda: _write_merged(path, parts, by_batch=loader.by_batch))
    finally:
        if run.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder(path: Path) -> Path:
    folder = temporary_path(path)
    folder.mkdir()
    return folder


def _discard(outputs: _Outputs) -> None:
    del outputs


def _open_part(folder: Path, dp_rank: int) -> BinaryIO:
    """Open the file for the results of a data-parallel rank.

    Raises:
        ConfigValueError: if the folder does not exist on this machine.
    """
    if not folder.is_dir():
        raise ConfigValueError(
            f"{folder}, which rank 0 created for the results of all ranks, does not exist on this machine. Write the results to "
            "a folder that all machines share, or predict in one process."
        )
    return (folder / str(dp_rank)).open("wb")


@final
class _PartWriter:
    """Appends outputs to a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, outputs: _Outputs) -> None:
        """Append the outputs for a batch."""
        pickle.dump(outputs, self._file, protocol=pickle.HIGHEST_PROTOCOL)


def _read_part(path: Path) -> Iterator[_Outputs]:
    """Yield the outputs that this program has just written."""
    with path.open("rb") as file:
        while file.peek(1):
            yield pickle.load(file)  # noqa: S301 -- a file that this program has just written


def _write_merged(path: Path, parts: Sequence[Path], *, by_batch: bool) -> int:
    return write_predictions(path, _merged([_read_part(part) for part in parts], by_batch=by_batch))


@torch.no_grad()
def _predict(run: Run, loader: EpochLoader, append: Callable[[_Outputs], None], fp16: bool | None) -> None:
    """Call ``append`` with the outputs for each batch of this rank. Collective if the forward pass is."""
    if loader.is_split and run.strategy.dp_size > 1:
        raise ConfigValueError(
            "The data is already split across the ranks by its sampler, dataset or loader, so the order of the results would be "
            "unknown. Pass data that is not split; it is split automatically."
        )
    model = run.model
    modes = [(module, module.training) for module in model.modules()]
    sizes = loader.batch_sizes()
    step = in_precision(run, predict_step_of(model), evaluation_dtype(run, fp16))
    try:
        model.eval()
        with isolate_rng(), run.evaluating(synchronized=True):
            for number, (_, batch) in enumerate(pad_forward_passes(run, loader, step)):
                outputs = to_host(step(batch))
                if not loader.is_batched:
                    append((outputs, None))
                    continue
                size = None if sizes is None else next(sizes)
                append((outputs, check_samples(outputs, size, f"Batch {number} on rank {run.rank}")))
    finally:
        for module, training in modes:
            module.training = training


def _merged(ranks: Sequence[Iterable[_Outputs]], *, by_batch: bool) -> Iterator[Any]:
    """Yield the results of samples in the order of the data, given the outputs of the ranks.

    Args:
        ranks: the outputs of each rank.
        by_batch: whether batches, rather than samples, were distributed round-robin over the ranks.
    """
    batches: list[Iterator[list[Any]]] = [map(_results, outputs) for outputs in ranks]
    if by_batch:
        yield from chain.from_iterable(_in_turn(batches))
    else:
        yield from _in_turn([chain.from_iterable(each) for each in batches])


def _results(outputs: _Outputs) -> list[Any]:
    values, count = outputs
    return [values] if count is None else split_samples(values, count)


def _in_turn(ranks: Sequence[Iterator[Any]]) -> Iterator[Any]:
    """Yield the first item of each rank, then the second item of each rank, and so on.

    Raises:
        TrainingError: if the items were not distributed round-robin.
    """
    ended: int | None = None
    for round_ in zip_longest(*ranks, fillvalue=_END):
        for rank, item in enumerate(round_):
            if item is _END:
                ended = rank
            elif ended is not None:
                raise TrainingError(
                    f"Rank {rank} has more results than rank {ended}, although samples are distributed in turn, so the order of "
                    "the data is unknown."
                )
            else:
                yield item
