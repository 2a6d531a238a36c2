"""Read the trace of all ranks."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from stratagem.errors import TraceError
from stratagem.trace.format import (
    FORMAT,
    SECTIONS,
    VERSION,
    Group,
    RankStep,
    RankTrace,
    Trace,
    decode_number,
    rank_file,
)
from stratagem.trace.values import Value

__all__ = ["read_trace"]

_ROOT_KEYS = ("rank", "world_size", "dp_rank", "dp_size", "data", "values", "steps")


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace, the files of all its ranks.

    Args:
        path: the JSON file of rank 0.

    Raises:
        TraceError: if a file is missing, is not a trace, is damaged, or was written by a newer version.
    """
    first = Path(path)
    header = _read_json(first)
    world_size = header["world_size"]
    ranks = [_read_rank(first, header)]
    for rank in range(1, world_size):
        file = rank_file(first, rank)
        if not file.is_file():
            raise TraceError(
                f"{first} is the trace of {world_size} ranks, but {file.name} of rank {rank} is missing. If the recorded run was "
                "still running or rank "
                f"{rank} failed, record again; if the files were copied, copy all of {first.stem}*.json and {first.stem}*.values."
            )
        other = _read_json(file)
        if (other["world_size"], other["rank"]) != (world_size, rank):
            raise TraceError(
                f"{file} belongs to rank {other['rank']} of {other['world_size']}, not to rank {rank} of {world_size} as "
                f"{first} requires. The files are from different recordings; record again."
            )
        ranks.append(_read_rank(file, other))
    steps = {f"rank {rank.rank}: {len(rank.steps)}" for rank in ranks}
    if len({len(rank.steps) for rank in ranks}) > 1:
        raise TraceError(
            f"The ranks of {first} recorded different numbers of steps ({', '.join(sorted(steps))}), so a rank failed, or the "
            "files are from different recordings. Record again."
        )
    if not ranks[0].steps:
        raise TraceError(
            f"{first} contains no step: no optimizer that has parameters of the recorded model made a step. Record at least one "
            "optimizer step, and pass the model that is trained."
        )
    return Trace(
        file=first, label=header.get("label", ""), world_size=world_size, dp_size=header["dp_size"], ranks=tuple(ranks)
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TraceError(
            f"{file} does not exist. Record a trace with stratagem.trace.record({str(file)!r}, model)."
        ) from None
    except (ValueError, OSError) as error:
        raise TraceError(f"{file} cannot be read as a trace: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TraceError(
            f"{file} is not a trace: its format is not {FORMAT!r}. Pass the JSON file that record() wrote."
        )
    if content.get("version") != VERSION:
        raise TraceError(
            f"{file} has version {content.get('version')} of the trace format; this version of Stratagem reads version "
            f"{VERSION}. Read it with the version of Stratagem that wrote it, or record again."
        )
    missing = [key for key in _ROOT_KEYS if key not in content]
    if missing:
        raise TraceError(f"{file} is damaged: it has no {', '.join(missing)}. Record again.")
    return content


def _read_rank(file: Path, content: Mapping[str, Any]) -> RankTrace:
    try:
        values = _read_values(file, content["data"], content["values"])
        steps = tuple(_read_step(number, step, values) for number, step in enumerate(content["steps"], start=1))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{file} is damaged ({type(error).__name__}: {error}). Record again.") from error
    return RankTrace(rank=content["rank"], dp_rank=content["dp_rank"], steps=steps)


def _read_values(file: Path, data: Mapping[str, Any], entries: list[Mapping[str, Any]]) -> list[Value]:
    path = file.with_name(Path(data["file"]).name)
    buffer = _map(path, file)
    if len(buffer) != data["size"] or blake3(buffer).hexdigest() != data["digest"]:
        raise TraceError(
            f"{path} does not belong to {file.name}, or is damaged: it has {len(buffer)} bytes and should have {data['size']}, "
            "with the recorded digest. Copy both files of the same recording, or record again."
        )
    return [_read_value(entry, buffer) for entry in entries]


def _map(path: Path, owner: Path) -> Any:
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                return b""
            # Private pages, because torch requires writable memory.
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise TraceError(
            f"{path}, which contains the numbers of {owner.name}, cannot be read: {error.strerror}. Keep both files together."
        ) from error


def _read_value(entry: Mapping[str, Any], buffer: Any) -> Value:
    dtype = torch.float64 if entry["summary"] else getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"unknown dtype {entry['dtype']!r}")
    length = entry["length"]
    numbers = (
        torch.frombuffer(buffer, dtype=dtype, count=length // dtype.itemsize, offset=entry["offset"])
        if length
        else torch.empty(0, dtype=dtype)
    )
    return Value(
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        digest=entry["digest"],
        norm=decode_number(entry["norm"]),
        largest=decode_number(entry["largest"]),
        is_summary=entry["summary"],
        numbers=numbers,
    )


def _read_step(number: int, step: Mapping[str, Any], values: list[Value]) -> RankStep:
    samples, losses, groups = step.get("samples"), step.get("losses"), step.get("groups")
    sections = {
        name: {key: values[index] for key, index in step[name].items()} if name in step else None for name in SECTIONS
    }
    return RankStep(
        step=number,
        samples=None if samples is None else tuple(map(tuple, samples)),
        losses=None if losses is None else tuple(map(decode_number, losses)),
        loss=None if step.get("loss") is None else decode_number(step["loss"]),
        weight=decode_number(step.get("weight", 1.0)),
        generator=step.get("generator"),
        draws=bool(step.get("draws", False)),
        grad_norm=None if step.get("grad_norm") is None else decode_number(step["grad_norm"]),
        groups=None if groups is None else tuple(map(_read_group, groups)),
        absent=dict(step.get("absent", {})),
        **sections,
    )


def _read_group(group: Mapping[str, Any]) -> Group:
    options = {key: decode_number(number) for key, number in group["options"].items()}
    return Group(parameters=tuple(group["parameters"]), options=options)
