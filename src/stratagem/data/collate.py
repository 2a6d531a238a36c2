"""Make a batch from samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stratagem.errors import ConfigTypeError

__all__ = ["pseudo_collate"]


def pseudo_collate(samples: Sequence[Any]) -> Any:
    """Group the samples' fields without stacking them: a list of values for each field.

    Tuples and lists give a list with one item for each field, mappings a dict by key, all else the list itself. Samples
    may have different shapes; a model's data preprocessor stacks them. For equal shapes use
    ``torch.utils.data.default_collate``.

    Raises:
        ConfigTypeError: if samples that are sequences differ in length, or mappings in their keys.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        differing = set().union(*(sample.keys() ^ first.keys() for sample in samples))
        if differing:
            raise ConfigTypeError(
                f"Samples of one batch have different keys: not all have {sorted(map(str, differing))}."
            )
        return {key: pseudo_collate([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple | list):
        if any(len(sample) != len(first) for sample in samples):
            lengths = sorted({len(sample) for sample in samples})
            raise ConfigTypeError(f"Samples of one batch have different numbers of fields: {lengths}.")
        fields = [pseudo_collate(list(field)) for field in zip(*samples, strict=True)]
        return type(first)(*fields) if hasattr(first, "_fields") else fields
    return list(samples)
