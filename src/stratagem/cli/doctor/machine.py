"""Check the versions, devices, communication backends and resource limits of this process."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as torch_dist

from stratagem._version import __version__
from stratagem.cli.doctor.finding import Finding
from stratagem.cli.doctor.gpus import check_gpus
from stratagem.utils import digit_version
from stratagem.utils.processes import usable_cores

try:
    import resource
except ImportError:  # Windows
    _HAS_RESOURCE = False
else:
    _HAS_RESOURCE = True

__all__ = ["check_machine", "check_open_files", "check_requirement"]

_OPEN_FILES = 4096  # Runs raise the soft limit to this value.
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- torch stores the batches of data workers there
_SHARED_BYTES = 2**30
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<least>[\d.]+)$")


def check_machine() -> list[Finding]:
    """Return the findings about versions, devices, GPUs, backends and limits."""
    return [*_versions(), *_devices(), *check_gpus(), _backends(), *_limits()]


def _versions() -> list[Finding]:
    own = f"stratagem {__version__}, Python {platform.python_version()}"
    if _installed("stratagem") is None:
        advice = "The versions of its dependencies cannot be checked. Run `pip install -e .` in its folder."
        return [Finding.warning("versions", f"{own}, not installed (imported from source)", advice)]
    matches = [_REQUIREMENT.match(requirement) for requirement in importlib.metadata.requires("stratagem") or ()]
    required = [
        check_requirement(match["name"], _installed(match["name"]), match["least"]) for match in matches if match
    ]
    return [Finding.ok("versions", own), *required]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirement(name: str, installed: str | None, least: str) -> Finding:
    """Compare the installed version of a library with the minimum version."""
    if installed is None:
        return Finding.problem("versions", f"{name} is not installed", f"pip install '{name}>={least}'")
    if digit_version(installed) < digit_version(least):
        return Finding.problem(
            "versions", f"{name} {installed}, older than {least}", f"pip install --upgrade '{name}>={least}'"
        )
    return Finding.ok("versions", f"{name} {installed}")


def _devices() -> list[Finding]:
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        build = "a CPU build" if not torch.backends.cuda.is_built() else "a CUDA build, which finds no device"
        advice = "If this machine has an accelerator, check its driver, and install a build of torch that supports it."
        return [Finding.warning("devices", f"no accelerator; {usable_cores()} CPU cores (torch is {build})", advice)]
    return [_try_device(torch.device(kind.type, index)) for index in range(torch.accelerator.device_count())]


def _try_device(device: torch.device) -> Finding:
    try:
        total = float(torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).sum().item())
    except RuntimeError as error:
        advice = "Another process may be using it, or its driver does not match this build of torch."
        return Finding.problem("devices", f"{device}: {error}", advice)
    if total != 64.0**3:
        found = f"{device} gives a wrong result: {total} instead of {64**3}"
        return Finding.problem("devices", found, "Check the hardware and its driver.")
    return Finding.ok("devices", f"{device} works")


def _backends() -> Finding:
    if not torch_dist.is_available():
        return Finding.problem(
            "backends", "torch is built without torch.distributed", "Install a different build of torch."
        )
    available = {
        "gloo": torch_dist.is_gloo_available(),
        "nccl": torch_dist.is_nccl_available(),
        "mpi": torch_dist.is_mpi_available(),
        "ucc": torch_dist.is_ucc_available(),
    }
    names = ", ".join(name for name, is_available in available.items() if is_available)
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None and kind.type == "cuda" and not available["nccl"]:
        return Finding.problem(
            "backends", f"{names}; none for {kind.type}", "Install a build of torch with NCCL, or train on one device."
        )
    if not available["gloo"]:
        return Finding.problem("backends", f"{names or 'none'}; no gloo", "Install a build of torch with gloo.")
    return Finding.ok("backends", names)


def _limits() -> list[Finding]:
    findings = []
    if _HAS_RESOURCE:
        findings.append(check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)))
    if _SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(_SHARED_MEMORY).free
        found = f"{free / 2**30:.1f} GiB free in {_SHARED_MEMORY}"
        advice = (
            "Data workers pass batches through shared memory. Start the container with --shm-size=8g or --ipc=host."
        )
        enough = free >= _SHARED_BYTES
        findings.append(
            Finding.ok("shared memory", found) if enough else Finding.warning("shared memory", found, advice)
        )
    return findings


def check_open_files(soft: int, hard: int) -> Finding:
    """Check whether the limit on open files is sufficient for data workers and sharded checkpoints.

    Args:
        soft: the soft limit; negative if unlimited.
        hard: the hard limit; negative if unlimited.
    """
    found = f"soft limit {'none' if soft < 0 else soft}, hard limit {'none' if hard < 0 else hard}"
    if 0 <= hard < _OPEN_FILES:
        advice = f"Raise the hard limit to at least {_OPEN_FILES}, with ulimit -Hn or in /etc/security/limits.conf."
        return Finding.warning("open files", found, advice)
    return Finding.ok("open files", found)
