"""Read what NVIDIA's driver reports about its GPUs: with NVML's Python bindings if they are installed, else with nvidia-smi."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, final

from stratagem.utils.imports import import_object

__all__ = ["Driver", "Gpu", "parse_gpus", "read_driver"]

_TIMEOUT_S: Final = 20.0
_BASIC: Final = ("uuid", "name", "driver_version", "memory.total")
_ECC: Final = "ecc.errors.uncorrected.volatile.total"
_OLD_REASONS, _NEW_REASONS = "clocks_throttle_reasons.active", "clocks_event_reasons.active"
_PENDING, _FAILURE = "remapped_rows.pending", "remapped_rows.failure"
# nvidia-smi rejects a query with a field that it does not know, so older drivers need other queries.
_QUERIES: Final = (
    (*_BASIC, _NEW_REASONS, _ECC, _PENDING, _FAILURE),
    (*_BASIC, _OLD_REASONS, _ECC, _PENDING, _FAILURE),
    (*_BASIC, _OLD_REASONS, _ECC),
    _BASIC,
)
_CUDA_VERSION: Final = re.compile(r"CUDA(?: UMD)? Version\s*:\s*(\d+)\.(\d+)")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What the driver reports about a GPU.

    Attributes:
        uuid: its identity, as in ``CUDA_VISIBLE_DEVICES``.
        name: its model.
        memory_mib: its memory in MiB; 0 if unknown.
        clock_reasons: the reasons for reduced clocks, as a bit mask of NVML; 0 if unknown.
        uncorrected_errors: the memory errors since the driver was loaded that ECC could not correct; None without ECC.
        repair_pending: whether memory rows are replaced at the next reset.
        repair_failed: whether memory rows could not be replaced.
    """

    uuid: str
    name: str
    memory_mib: int = 0
    clock_reasons: int = 0
    uncorrected_errors: int | None = None
    repair_pending: bool = False
    repair_failed: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """A driver, the newest version of CUDA that it supports, which may be unknown, and its GPUs."""

    version: str
    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]


def read_driver() -> Driver | str:
    """Return what the driver reports, or the reason why it cannot be asked."""
    with suppress(ImportError):
        return _read_nvml(import_object("pynvml"))
    command = shutil.which("nvidia-smi")
    if command is None:
        return "nvidia-smi is not installed"
    return _read_nvidia_smi(command)


# ---- NVML -----------------------------------------------------------------------------------------------------------


def _read_nvml(nvml: Any) -> Driver | str:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return f"NVML cannot be initialized: {error}"
    try:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return Driver(
            version=_text(nvml.nvmlSystemGetDriverVersion()),
            cuda=(cuda // 1000, cuda % 1000 // 10),
            gpus=tuple(_read_handle(nvml, handle) for handle in handles),
        )
    except nvml.NVMLError as error:
        return f"NVML failed: {error}"
    finally:
        nvml.nvmlShutdown()


def _read_handle(nvml: Any, handle: Any) -> Gpu:
    def ask(function: str, *args: int) -> Any:
        """Return the answer, or None if the GPU or an old version of the bindings does not support the function."""
        try:
            return getattr(nvml, function)(handle, *args)
        except (nvml.NVMLError, AttributeError):
            return None

    memory, rows = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetRemappedRows")
    # Correctable and uncorrectable errors, whether a repair is pending, and whether one has failed.
    pending, failed = (bool(rows[2]), bool(rows[3])) if rows is not None else (False, False)
    # Errors of type 1 (uncorrected), counted by counter 0 (since the driver was loaded).
    return Gpu(
        uuid=_text(ask("nvmlDeviceGetUUID") or ""),
        name=_text(ask("nvmlDeviceGetName") or "unknown GPU"),
        memory_mib=0 if memory is None else int(memory.total) // 2**20,
        clock_reasons=int(ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0),
        uncorrected_errors=ask("nvmlDeviceGetTotalEccErrors", 1, 0),
        repair_pending=pending,
        repair_failed=failed,
    )


def _text(value: str | bytes) -> str:
    """Return a string; old versions of the bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value


# ---- nvidia-smi -------------------------------------------------------------------------------------------------------


def _read_nvidia_smi(command: str) -> Driver | str:
    summary = _run(command)
    if summary.returncode:
        return f"nvidia-smi fails: {_first_line(summary.stdout or summary.stderr)}"
    found = _CUDA_VERSION.search(summary.stdout)
    for fields in _QUERIES:
        answer = _run(command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        if not answer.returncode:
            version, gpus = parse_gpus(answer.stdout, fields)
            return Driver(version=version, cuda=found and (int(found[1]), int(found[2])), gpus=gpus)
    return f"nvidia-smi fails: {_first_line(answer.stdout or answer.stderr)}"


def _run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 -- a fixed command, found on the path
            [command, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess([command], 1, "", f"{type(error).__name__}: {error}")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[0]


def parse_gpus(text: str, fields: Sequence[str]) -> tuple[str, tuple[Gpu, ...]]:
    """Return the version of the driver, and the GPUs in an answer of nvidia-smi in CSV format without units.

    Args:
        text: one line for each GPU. A value that the GPU does not support is ``[N/A]``, ``N/A`` or ``[Not Supported]``.
        fields: the names of the columns.
    """
    rows = [dict(zip(fields, row, strict=False)) for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]
    version = rows[0].get("driver_version", "") if rows else ""
    return version, tuple(_gpu_of(row) for row in rows)


def _gpu_of(row: Mapping[str, str]) -> Gpu:
    return Gpu(
        uuid=row.get("uuid", ""),
        name=row.get("name", "unknown GPU"),
        memory_mib=_number(row.get("memory.total")) or 0,
        clock_reasons=_number(row.get(_NEW_REASONS, row.get(_OLD_REASONS))) or 0,
        uncorrected_errors=_number(row.get(_ECC)),
        repair_pending=_is_yes(row.get(_PENDING)),
        repair_failed=_is_yes(row.get(_FAILURE)),
    )


def _number(text: str | None) -> int | None:
    """Return a decimal or hexadecimal number; None if the value is not supported."""
    with suppress(ValueError):
        return int((text or "").strip(), 0)
    return None


def _is_yes(text: str | None) -> bool:
    return (text or "").strip().lower() in {"yes", "1"}
