"""Write the part of a trace that one rank records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final, final

from blake3 import blake3
from torch import Tensor

from stratagem.storage import atomic_file, remove, write_atomic
from stratagem.trace.format import FORMAT, VERSION, Group, encode_number, rank_file
from stratagem.trace.values import Value, bytes_of

__all__ = ["FULL_LIMIT", "TraceWriter"]

#: The total size of the parameters, in bytes, up to which all elements are recorded.
FULL_LIMIT: Final = 64 * 2**20


@final
class TraceWriter:
    """Writes the steps of one rank.

    The methods record the values of the current step; ``end_step`` completes it. Numbers are written while the run continues;
    :meth:`close` publishes the files, first the numbers, then the JSON file.

    Args:
        path: the JSON file of the trace; other ranks than 0 insert their rank.
        rank: this rank.
        world_size: the number of ranks.
        dp_rank: the index of this rank's share of the data; by default, ``rank``.
        dp_size: the number of shares of the data; by default, ``world_size``.
        label: a description of the run.
        full: whether to record all elements of large tensors instead of a summary.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        dp_rank: int | None = None,
        dp_size: int | None = None,
        label: str = "",
        full: bool = True,
    ) -> None:
        self.file = rank_file(path, rank)
        self._data_file = rank_file(path, rank, ".values")
        self._full = full
        self._header: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "label": label,
            "rank": rank,
            "world_size": world_size,
            "dp_rank": rank if dp_rank is None else dp_rank,
            "dp_size": world_size if dp_size is None else dp_size,
        }
        self._values: list[dict[str, Any]] = []
        self._index: dict[tuple[Any, ...], int] = {}
        self._steps: list[dict[str, Any]] = []
        self._hash = blake3()
        self._size = 0
        self._closed = False
        self._current = _new_step()
        # An older trace under this name would otherwise be mistaken for this one if the run is killed.
        for old in (self.file, self._data_file):
            if old.exists():
                remove(old)
        self._stack = ExitStack()
        self._data: BinaryIO = self._stack.enter_context(
            self._stack.enter_context(atomic_file(self._data_file)).open("wb")
        )

    @property
    def num_steps(self) -> int:
        """The number of completed steps."""
        return len(self._steps)

    def add_samples(self, samples: Sequence[str]) -> None:
        """Record the samples of the next micro-batch."""
        self._current.setdefault("samples", []).append(list(samples))

    def add_loss(self, loss: float) -> None:
        """Record the loss of the next micro-batch."""
        self._current.setdefault("losses", []).append(encode_number(loss))

    def set_loss(self, loss: float, weight: float = 1.0) -> None:
        """Record the loss of the step on this rank, and the weight of the rank in means over ranks."""
        self._current["loss"] = encode_number(loss)
        self._current["weight"] = weight

    def set_generator(self, digest: str, *, draws: bool) -> None:
        """Record the state of the generators at the start of the step, and whether the forward passes used them."""
        self._current["generator"] = digest
        self._current["draws"] = draws

    def set_grad_norm(self, norm: float) -> None:
        """Record the gradient norm that was computed in the run."""
        self._current["grad_norm"] = encode_number(norm)

    def add_groups(self, groups: Iterable[Group]) -> None:
        """Record the parameter groups of an optimizer, with the options of this update."""
        self._current.setdefault("groups", []).extend(
            {
                "parameters": list(group.parameters),
                "options": {key: encode_number(n) for key, n in group.options.items()},
            }
            for group in groups
        )

    def put(self, section: str, tensors: Mapping[str, Tensor]) -> None:
        """Record tensors, or replace their values, in one of the groups of tensors in ``SECTIONS``."""
        self._current.setdefault(section, {}).update({name: self._store(tensor) for name, tensor in tensors.items()})

    def set_absent(self, name: str, reason: str) -> None:
        """Record why a value of the step is not visible. Values that were recorded before are removed."""
        self._current.pop(name, None)
        self._current["absent"][name] = reason

    def discard_step(self) -> None:
        """Discard the values of the current step."""
        self._current = _new_step()

    def end_step(self) -> None:
        """Complete the current step, and begin the next one."""
        self._steps.append(self._current)
        self._current = _new_step()

    def close(self) -> Path:
        """Publish the completed steps, and return the JSON file. Idempotent."""
        if not self._closed:
            self._closed = True
            self._stack.close()
            data = {"file": self._data_file.name, "size": self._size, "digest": self._hash.hexdigest()}
            document = {**self._header, "data": data, "values": self._values, "steps": self._steps}
            write_atomic(self.file, json.dumps(document, separators=(",", ":"), allow_nan=False))
        return self.file

    def _store(self, tensor: Tensor) -> int:
        """Write the value of a tensor, unless an equal one is stored, and return its index."""
        value = Value.of(tensor, full=self._full)
        key = (value.digest, value.shape, value.dtype, value.is_summary)
        if key not in self._index:
            self._index[key] = len(self._values)
            data = bytes_of(value.numbers)
            self._values.append(
                {
                    "shape": list(value.shape),
                    "dtype": value.dtype,
                    "digest": value.digest,
                    "norm": encode_number(value.norm),
                    "largest": encode_number(value.largest),
                    "summary": value.is_summary,
                    "offset": self._size,
                    "length": len(data),
                }
            )
            self._data.write(data)
            self._hash.update(data)
            self._size += len(data)
        return self._index[key]


def _new_step() -> dict[str, Any]:
    return {"absent": {}}
