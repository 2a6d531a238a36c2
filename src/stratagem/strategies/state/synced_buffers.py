"""Use the same buffers on all ranks during evaluation and in the model state of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from stratagem.checkpoint import digest_of_tensor
from stratagem.distributed import World, all_gather_object, all_reduce, broadcast
from stratagem.errors import ConfigValueError, StateError
from stratagem.tensors.dtensor import has_all_values, to_local, with_local
from stratagem.utils import canonical_names, did_you_mean
from stratagem.utils.names import some_names

__all__ = ["BUFFER_SOURCES", "Buffer", "BufferSource", "SyncedBuffers", "iter_buffers", "require_buffer_source"]

BufferSource = Literal["rank0", "mean"]
BUFFER_SOURCES: Final[tuple[str, ...]] = get_args(BufferSource)

_STATISTICS: Final = ("running_mean", "running_var")
_MOST_NAMES: Final = 8


@final
@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer of a model, its full name, and the module and the key under which it is registered."""

    name: str
    owner: nn.Module
    key: str
    tensor: Tensor

    @property
    def is_persistent(self) -> bool:
        """Whether the buffer is part of the state dict."""
        return self.key not in self.owner._non_persistent_buffers_set

    @property
    def is_statistic(self) -> bool:
        """Whether the buffer is the running mean or variance of one of torch's BatchNorm classes."""
        return isinstance(self.owner, _BatchNorm) and self.key in _STATISTICS

    @property
    def can_be_compared(self) -> bool:
        """Whether the bytes of the buffer can be compared and sent."""
        tensor = self.tensor
        return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def require_buffer_source(source: Any) -> BufferSource:
    """Check ``source``, the value of the strategy option ``buffers``, and return it.

    Raises:
        ConfigValueError: if the value is unknown.
    """
    if source not in BUFFER_SOURCES:
        raise ConfigValueError(f"Invalid value for buffers: {source!r}. {did_you_mean(str(source), BUFFER_SOURCES)}")
    return source  # type: ignore[no-any-return]  # checked


def iter_buffers(model: nn.Module) -> Iterator[Buffer]:
    """Yield the buffers of all modules; a shared module is visited once.

    The state dict is not used, because building it would gather the parameters of an engine's tensor-parallel layers.
    """
    canonical = canonical_names(model)
    for prefix, module in model.named_modules():
        for key, tensor in module.named_buffers(recurse=False):
            yield Buffer(canonical(f"{prefix}.{key}" if prefix else key), module, key, tensor)


@final
class SyncedBuffers:
    """Replaces buffers that differ between ranks, such as the running statistics of BatchNorm, during an evaluation.

    Training continues with the buffers of each rank, which are restored bit for bit afterwards. If all buffers are equal,
    only a digest is compared.

    Args:
        world: the rank of this process and the number of ranks.
        logger: the logger for the names of buffers that differ between ranks, which are logged once.
        source: ``"rank0"`` uses the buffers of rank 0. ``"mean"`` averages the running means and variances of torch's
            BatchNorm classes over the ranks, and uses rank 0's values for all other buffers.
    """

    def __init__(self, world: World, logger: logging.Logger, source: BufferSource) -> None:
        self.source: Final = source
        self._world = world
        self._logger = logger
        self._named: set[str] = set()
        # The buffers that are currently replaced, with this rank's values; None outside of an evaluation.
        self._own: list[tuple[Buffer, Tensor]] | None = None

    def announce(self, model: nn.Module) -> None:
        """Log the names of buffers that each rank updates from its own samples."""
        if self._world.size > 1:
            layers = (each for each in iter_buffers(model) if isinstance(each.owner, _BatchNorm))
            self._log_names([each.name for each in layers if not isinstance(each.owner, nn.SyncBatchNorm)])

    def local_values(self, model: nn.Module, group: ProcessGroup | None) -> dict[str, Tensor]:
        """Return this rank's values of the persistent buffers that differ between ranks. Collective.

        Even during an evaluation, these are the values with which training continues. They are not copied.

        Args:
            model: the unwrapped model.
            group: see :meth:`applied`.
        """
        differing = [(each, each.tensor) for each in self._differing(model, group)] if self._own is None else self._own
        kept = ((each, own) for each, own in differing if each.is_persistent and has_all_values(each.tensor))
        return {each.name: to_local(own) for each, own in kept}

    @property
    def changes_rank0(self) -> bool:
        """Whether the synchronized buffers can differ from the buffers of rank 0."""
        return self.source == "mean" and self._world.size > 1

    @contextmanager
    def applied(self, model: nn.Module, group: ProcessGroup | None) -> Iterator[tuple[Tensor, ...]]:
        """Use the synchronized buffers inside the ``with`` block; yield the replaced buffers.

        Entering the block is collective; leaving it is not.

        Args:
            model: the unwrapped model.
            group: the ranks that together process all data, if there are other ranks that process the same samples, as
                in tensor parallelism; None for all ranks.

        Raises:
            StateError: if a persistent buffer has different shapes or dtypes on the ranks.
        """
        if self._own is not None or self._world.size == 1:
            yield ()
            return
        differing = self._differing(model, group)
        values = self.copies(
            {each.name: each.tensor for each in differing},
            statistics=[each.name for each in differing if each.is_statistic],
            group=group,
        )
        self._own = [(each, each.tensor.detach().clone()) for each in differing]
        try:
            with torch.no_grad():
                for each in differing:
                    to_local(each.tensor).copy_(to_local(values[each.name]))
            yield tuple(each.tensor for each in differing)
        finally:
            replaced, self._own = self._own, None
            with torch.no_grad():
                for each, own in replaced:
                    to_local(each.tensor).copy_(to_local(own))
                    # The evaluation may have registered another tensor under this name.
                    each.owner._buffers[each.key] = each.tensor

    def copies(
        self, tensors: Mapping[str, Tensor], *, statistics: Iterable[str], group: ProcessGroup | None
    ) -> dict[str, Tensor]:
        """Return synchronized copies of tensors, which have the same names, shapes and dtypes on all ranks. Collective.

        Args:
            tensors: the tensors of this rank. For a ``DTensor``, the local shard is synchronized.
            statistics: the names of running means and variances of BatchNorm layers.
            group: see :meth:`applied`.
        """
        averaged = set(statistics) if self.source == "mean" else set()
        whole = {name: to_local(each) for name, each in tensors.items() if has_all_values(each)}
        shards = {name: to_local(each) for name, each in tensors.items() if name not in whole}
        means = {name: each for name, each in whole.items() if name in averaged}
        rest = {name: each for name, each in whole.items() if name not in averaged}
        values = {**_means(means), **_from_first(rest, None), **_from_first(shards, group)}
        return {name: with_local(tensors[name], value) for name, value in values.items()}

    def _differing(self, model: nn.Module, group: ProcessGroup | None) -> list[Buffer]:
        """Return the buffers whose values differ between ranks, in the same order on every rank. Collective."""
        buffers = [each for each in iter_buffers(model) if each.can_be_compared]
        differing = self._compare([each for each in buffers if has_all_values(each.tensor)], None)
        shards = [each for each in buffers if not has_all_values(each.tensor)]
        if group is not None and shards:
            # Shards of tensor-parallel layers differ by design, except between ranks that process different samples.
            differing += self._compare(shards, group)
        self._log_names([each.name for each in differing])
        return differing

    def _compare(self, buffers: Sequence[Buffer], group: ProcessGroup | None) -> list[Buffer]:
        own = {each.name: _describe(each) for each in buffers}
        if len(set(all_gather_object(_digest_of_all(own), group))) == 1:
            return []
        ranks = all_gather_object(own, group)
        differing = []
        for each in buffers:
            theirs = [rank.get(each.name) for rank in ranks]
            if len({None if one is None else one[:2] for one in theirs}) > 1:
                if each.is_persistent:
                    raise StateError(_shape_error(each.name, theirs))
                # This is a cache, whose size depends on the samples that the rank has seen.
                continue
            if len(set(theirs)) > 1:
                differing.append(each)
        return differing

    def _log_names(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._named]
        if not new:
            return
        self._named.update(new)
        used = "the buffers of rank 0"
        if self.source == "mean":
            used = "the mean over the ranks for running means and variances of BatchNorm, and rank 0's values for other buffers"
        self._logger.info(
            "Each rank updates %d buffers from its own samples: %s. Training uses the values of each rank. Evaluation "
            "and the weights in checkpoints use %s (strategy option buffers=%r).",
            len(new), some_names(new, _MOST_NAMES), used, self.source,
        )  # fmt: skip


def _digest_of_all(described: Mapping[str, Any]) -> str:
    """Return a single digest of the descriptions of all buffers."""
    return digest_of_tensor(torch.frombuffer(bytearray(repr(sorted(described.items())), "utf-8"), dtype=torch.uint8))


def _describe(buffer: Buffer) -> tuple[tuple[int, ...], str, str]:
    local = to_local(buffer.tensor)
    return tuple(local.shape), str(local.dtype), digest_of_tensor(local)


def _shape_error(name: str, theirs: Sequence[Any]) -> str:
    found = [
        f"rank {rank}: missing" if one is None else f"rank {rank}: {one[1].removeprefix('torch.')}{list(one[0])}"
        for rank, one in enumerate(theirs)
    ]
    return (
        f"The buffer {name!r} has different shapes or dtypes on the ranks ({', '.join(found[:_MOST_NAMES])}), so an evaluation "
        "would depend on the rank, and a checkpoint could not restore it. Give it the same shape on all ranks, or register it "
        "with persistent=False if it is a cache."
    )


def _from_first(tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> dict[str, Tensor]:
    """Return the values of the first rank of a group, sent as bytes with one collective per device. Collective."""
    values: dict[str, Tensor] = {}
    for device in dict.fromkeys(each.device for each in tensors.values()):
        some = {name: each.detach() for name, each in tensors.items() if each.device == device}
        sent = torch.cat([each.contiguous().reshape(-1).view(torch.uint8) for each in some.values()])
        broadcast(sent, 0, group)
        sizes = [each.numel() * each.element_size() for each in some.values()]
        for (name, each), part in zip(some.items(), sent.split(sizes), strict=True):
            # Copy the bytes, because they must be aligned with the elements of the tensor.
            values[name] = part.clone().view(each.dtype).view(each.shape)
    return values


def _means(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the means over all ranks, computed at least in float32, with one collective per device and dtype. Collective."""
    values: dict[str, Tensor] = {}
    kinds = dict.fromkeys((each.device, torch.promote_types(each.dtype, torch.float32)) for each in tensors.values())
    for device, dtype in kinds:
        some = {
            name: each.detach()
            for name, each in tensors.items()
            if (each.device, torch.promote_types(each.dtype, torch.float32)) == (device, dtype)
        }
        mean = torch.cat([each.to(dtype).reshape(-1) for each in some.values()])
        all_reduce(mean, "mean")
        for (name, each), part in zip(some.items(), mean.split([each.numel() for each in some.values()]), strict=True):
            values[name] = part.view(each.shape).to(each.dtype)
    return values
