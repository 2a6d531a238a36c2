"""Collate samples without stacking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stratagem.errors import ConfigTypeError

__all__ = ["pseudo_collate"]


def pseudo_collate(samples: Sequence[Any]) -> Any:
    """Group the fields of samples into lists, without stacking tensors.

    Samples that are tuples or lists yield a list with one list of values per field, mappings yield a dict of lists, and any
    other samples are returned as a list. Samples may have different shapes; the model's data preprocessor can stack them.
    For equal shapes, use ``torch.utils.data.default_collate``.

    Raises:
        ConfigTypeError: if the samples have different lengths or different keys.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        differing = set().union(*(sample.keys() ^ first.keys() for sample in samples))
        if differing:
            raise ConfigTypeError(
                f"The samples of a batch have different keys: {sorted(map(str, differing))} are not in all of them."
            )
        return {key: pseudo_collate([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple | list):
        if any(len(sample) != len(first) for sample in samples):
            lengths = sorted({len(sample) for sample in samples})
            raise ConfigTypeError(f"The samples of a batch have different numbers of fields: {lengths}.")
        fields = [pseudo_collate(list(field)) for field in zip(*samples, strict=True)]
        return type(first)(*fields) if hasattr(first, "_fields") else fields
    return list(samples)
