"""Average named values over ranks, whose sets of names may differ."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from stratagem.distributed.collectives import Group, all_reduce, get_world_size
from stratagem.distributed.objects import all_gather_object

__all__ = ["mean_by_name"]

# A digest of the names is reduced with the values, as its bytes and their squares; both sums are exact in float64.
_DIGEST_BYTES: Final = 8
_HEADER: Final = 2 * _DIGEST_BYTES
# The first message has the same length on all ranks regardless of their names: it holds up to this many values.
_FIRST_VALUES: Final = 48


def mean_by_name(values: Mapping[str, float], group: Group | None = None) -> dict[str, float]:
    """Return the mean of each value over the ranks that have it, sorted by name and equal on all ranks.

    Collective; ranks may have different names and different numbers of names. With the same names on all ranks, it takes
    one all-reduce, or two for more than 48 names; otherwise an all-gather of the names and values follows.
    """
    names = sorted(values)
    size = get_world_size(group)
    if size == 1:
        return {name: float(values[name]) for name in names}
    numbers = torch.tensor([values[name] for name in names], dtype=torch.float64)
    first, rest = numbers[:_FIRST_VALUES], numbers[_FIRST_VALUES:]
    digest = _digest_of(names)
    message = torch.cat([digest, digest.square(), first, first.new_zeros(_FIRST_VALUES - len(first))])
    all_reduce(message, group=group)
    sums, squares = message[:_HEADER].chunk(2)
    # By Cauchy-Schwarz, equality holds only if the ranks' bytes are equal. All ranks have the same sums, so they agree.
    if not torch.equal(sums.square(), size * squares):
        return _mean_of(all_gather_object(dict(values), group))
    if len(rest):
        all_reduce(rest, group=group)
    totals = torch.cat([message[_HEADER:][: len(first)], rest])
    return dict(zip(names, (totals / size).tolist(), strict=True))


def _digest_of(names: Sequence[str]) -> Tensor:
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.tensor(list(digest[:_DIGEST_BYTES]), dtype=torch.float64)


def _mean_of(ranks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    by_name: dict[str, list[float]] = defaultdict(list)
    for values in ranks:
        for name, value in values.items():
            by_name[name].append(value)
    return {name: sum(by_name[name]) / len(by_name[name]) for name in sorted(by_name)}
