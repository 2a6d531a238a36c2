"""Examine what this process sees by itself: versions, devices, back ends, limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as torch_dist

from stratagem._version import __version__
from stratagem.cli.doctor.finding import Finding
from stratagem.utils import digit_version

if sys.platform != "win32":
    import resource

__all__ = ["examine_machine", "judge_open_files", "judge_version"]

_OPEN_FILES = 4096  # what runs raise the soft limit to
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- where torch puts the batches of data workers
_SHARED_BYTES = 2**30
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<least>[\d.]+)$")


def examine_machine() -> list[Finding]:
    """Return the findings about versions, devices, back ends and limits."""
    return [*_versions(), *_devices(), _backends(), *_limits()]


def _versions() -> list[Finding]:
    own = f"stratagem {__version__}, Python {platform.python_version()}"
    if _installed("stratagem") is None:
        advice = "What it requires is not known: install it with `pip install -e .` in its folder."
        return [Finding.note("versions", f"{own}; it is not installed, but runs from its source", advice)]
    matches = [_REQUIREMENT.match(requirement) for requirement in importlib.metadata.requires("stratagem") or ()]
    required = [judge_version(match["name"], _installed(match["name"]), match["least"]) for match in matches if match]
    return [Finding.good("versions", own), *required]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge_version(name: str, installed: str | None, least: str) -> Finding:
    """Compare the installed version of a library with the least that is needed."""
    if installed is None:
        return Finding.problem("versions", f"{name} is not installed", f"pip install '{name}>={least}'")
    if digit_version(installed) < digit_version(least):
        return Finding.problem(
            "versions", f"{name} {installed}, older than {least}", f"pip install --upgrade '{name}>={least}'"
        )
    return Finding.good("versions", f"{name} {installed}")


def _devices() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        built = "CPU only" if not torch.backends.cuda.is_built() else "with CUDA, which finds no device"
        advice = "If there is an accelerator: look at its driver, and install the build of torch that serves it."
        return [Finding.note("devices", f"no accelerator; {cores} cores (torch is built {built})", advice)]
    return [_try_device(torch.device(kind.type, index)) for index in range(torch.accelerator.device_count())]


def _try_device(device: torch.device) -> Finding:
    try:
        total = float(torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).sum().item())
    except RuntimeError as error:
        advice = "Another process may hold it, or its driver does not fit this build of torch."
        return Finding.problem("devices", f"{device}: {error}", advice)
    if total != 64.0**3:
        return Finding.problem("devices", f"{device} computes wrongly: {total} for {64**3}", "Have it examined.")
    return Finding.good("devices", f"{device} computes")


def _backends() -> Finding:
    if not torch_dist.is_available():
        return Finding.problem(
            "back ends", "torch is built without torch.distributed", "Install another build of torch."
        )
    there = {
        "gloo": torch_dist.is_gloo_available(),
        "nccl": torch_dist.is_nccl_available(),
        "mpi": torch_dist.is_mpi_available(),
        "ucc": torch_dist.is_ucc_available(),
    }
    names = ", ".join(name for name, available in there.items() if available)
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None and kind.type == "cuda" and not there["nccl"]:
        return Finding.problem(
            "back ends", f"{names}; none for {kind.type}", "Install a build of torch with NCCL, or train on one device."
        )
    if not there["gloo"]:
        return Finding.problem("back ends", f"{names or 'none'}; no gloo", "Install a build of torch with gloo.")
    return Finding.good("back ends", names)


def _limits() -> list[Finding]:
    findings = []
    if sys.platform != "win32":
        findings.append(judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)))
    if _SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(_SHARED_MEMORY).free
        found = f"{free / 2**30:.1f} GiB free in {_SHARED_MEMORY}"
        advice = "Data workers hand batches over there. Start the container with more: --shm-size=8g or --ipc=host."
        enough = free >= _SHARED_BYTES
        findings.append(
            Finding.good("shared memory", found) if enough else Finding.note("shared memory", found, advice)
        )
    return findings


def judge_open_files(soft: int, hard: int) -> Finding:
    """Say whether as many files can be open as data workers and many shards need; -1 stands for no limit."""
    found = f"{'no' if soft < 0 else soft} soft limit, {'no' if hard < 0 else hard} hard limit"
    if 0 <= hard < _OPEN_FILES:
        advice = f"Have the administrator raise it to {_OPEN_FILES} or more: ulimit -Hn, /etc/security/limits.conf."
        return Finding.note("open files", found, advice)
    return Finding.good("open files", found)
