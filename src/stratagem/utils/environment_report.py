"""Collect information about hardware and software, which is logged at the start of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

import torch

from stratagem._version import __version__
from stratagem.utils.processes import usable_cores

__all__ = ["collect_env"]

_COMPILER_TIMEOUT_S = 5.0
_UNKNOWN = "unknown"


def collect_env() -> dict[str, str]:
    """Return the environment information to include in a bug report: platform, Python, PyTorch, devices, versions, memory.

    Environment variables are not read, and libraries are not imported to find their versions.
    """
    report = {
        "stratagem": __version__,
        "Platform": platform.platform(),
        "Python": sys.version.replace("\n", " "),
        "CPU": _describe_cpu(),
        "Memory": _describe_memory(),
        "PyTorch": torch.__version__,
        "PyTorch build": _describe_build(),
        **_describe_accelerators(),
        "NumPy": _installed("numpy") or _UNKNOWN,
    }
    for name, distribution in (("TorchMetrics", "torchmetrics"), ("TorchVision", "torchvision")):
        version = _installed(distribution)
        if version is not None:
            report[name] = version
    compiler = _describe_compiler()
    if compiler is not None:
        report["GCC"] = compiler
    return report


def _describe_cpu() -> str:
    model = platform.processor() or platform.machine()
    # Containers and job schedulers often provide fewer cores than the machine has.
    return f"{model}, {usable_cores()} of {os.cpu_count()} cores usable"


def _describe_memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):  # Not available on this platform.
        return _UNKNOWN


def _describe_build() -> str:
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()[1:]]
    # Omit the build settings, which are about 2000 characters of compiler flags.
    return "; ".join(line for line in lines if not line.startswith("Build settings"))


def _describe_accelerators() -> dict[str, str]:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return {"Accelerator": "none"}
    count = torch.accelerator.device_count()
    facts = {"Accelerator": f"{count} x {device.type}"}
    if device.type == "cuda":
        facts["Accelerator"] = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        facts["CUDA"] = torch.version.cuda or f"HIP {torch.version.hip}"
        facts["cuDNN"] = str(torch.backends.cudnn.version())
    return facts


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_compiler() -> str | None:
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603 -- a fixed command, found on the path
            [compiler, "--version"], capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return _UNKNOWN
    return answer.stdout.partition("\n")[0]
