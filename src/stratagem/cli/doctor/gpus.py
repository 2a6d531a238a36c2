"""Check the GPUs of this machine: their driver, the build of torch, their health, and variables that slow them down."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from stratagem.cli.doctor.finding import Finding
from stratagem.cli.doctor.nvidia import Driver, Gpu, read_driver
from stratagem.utils.names import some_names

__all__ = ["check_architectures", "check_build", "check_gpus", "check_health", "check_models", "check_variables"]

_SUBJECT: Final = "GPUs"
# The bits of NVML's reasons for reduced clocks that need attention. Idle GPUs, clocks set by the user and the power limit
# are normal.
_CLOCK_REASONS: Final = {
    0x08: "a hardware slowdown",
    0x20: "its temperature (software)",
    0x40: "its temperature (hardware)",
    0x80: "the power supply",
}
_MOST_SHOWN: Final = 4


def check_gpus() -> list[Finding]:
    """Return the findings about NVIDIA GPUs; a single line with the reason if there are none."""
    driver = read_driver()
    build = torch.version.cuda
    if isinstance(driver, str):
        if not torch.cuda.is_available():
            found = f"none: {driver}, and torch is {'a CPU build' if build is None else f'built for CUDA {build}'}"
            return [Finding.ok(_SUBJECT, found)]
        health = Finding.warning(
            _SUBJECT, f"driver and health unknown: {driver}", "Install nvidia-ml-py, or make nvidia-smi available."
        )
        return [health, *_check_visible()]
    if not driver.gpus:
        return [Finding.ok(_SUBJECT, f"none: driver {driver.version} finds no GPU")]
    return [
        check_build(driver, build, is_rocm=torch.version.hip is not None),
        check_models(driver.gpus),
        *(finding for number, gpu in enumerate(driver.gpus) for finding in check_health(number, gpu)),
        *(_check_visible() if torch.cuda.is_available() else ()),
    ]


def _check_visible() -> list[Finding]:
    """Check the GPUs that torch sees, and the variables that affect them."""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    architectures = [] if torch.version.hip else check_architectures(capabilities, torch.cuda.get_arch_list())
    return [*architectures, *check_variables(os.environ)]


def check_build(driver: Driver, build: str | None, *, is_rocm: bool = False) -> Finding:
    """Check whether this build of torch can use the driver.

    Args:
        driver: the driver.
        build: the version of CUDA that torch is built for; None without CUDA.
        is_rocm: whether torch is built for ROCm.
    """
    supported = "" if driver.cuda is None else f", which supports CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    found = f"{len(driver.gpus)} GPU(s), driver {driver.version}{supported}"
    limit = "" if driver.cuda is None else f" {driver.cuda[0]}.{driver.cuda[1]} or older"
    if build is None:
        kind = "ROCm" if is_rocm else "the CPU"
        return Finding.problem(
            _SUBJECT, f"{found}; torch is built for {kind}", f"Install a build of torch for CUDA{limit}."
        )
    major = int(build.partition(".")[0])
    if driver.cuda is not None and major > driver.cuda[0]:
        advice = f"Install a newer driver, or a build of torch for CUDA{limit}."
        return Finding.problem(_SUBJECT, f"{found}; torch is built for CUDA {build}", advice)
    return Finding.ok(_SUBJECT, f"{found}; torch is built for CUDA {build}")


def check_models(gpus: Sequence[Gpu]) -> Finding:
    """Check whether all GPUs are of the same model and have the same memory."""
    models = [f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB)" for gpu in gpus]
    counts = ", ".join(f"{models.count(model)} x {model}" for model in dict.fromkeys(models))
    if len(set(models)) > 1:
        advice = "All ranks wait for the slowest GPU, and the smallest limits the batch. Select equal GPUs: CUDA_VISIBLE_DEVICES."
        return Finding.warning(_SUBJECT, counts, advice)
    return Finding.ok(_SUBJECT, counts)


def check_health(number: int, gpu: Gpu) -> list[Finding]:
    """Return the findings about throttling and memory errors of a GPU; none if it is healthy.

    Args:
        number: the number of the GPU, as in the output of nvidia-smi.
        gpu: what its driver reports.
    """
    name = f"GPU {number} ({gpu.name}, {gpu.uuid})"
    findings = []
    reasons = [text for bit, text in _CLOCK_REASONS.items() if gpu.clock_reasons & bit]
    if reasons:
        advice = "Check the cooling and the power supply. All ranks wait for this GPU."
        findings.append(
            Finding.warning(_SUBJECT, f"{name}: clocks are reduced because of {', '.join(reasons)}", advice)
        )
    if gpu.uncorrected_errors:
        found = f"{name}: {gpu.uncorrected_errors} uncorrected memory errors since the driver was loaded"
        findings.append(
            Finding.problem(
                _SUBJECT, found, "Reset the GPU (nvidia-smi --gpu-reset), and do not use it if errors return."
            )
        )
    if gpu.repair_failed:
        found = f"{name}: damaged memory rows could not be replaced"
        findings.append(Finding.problem(_SUBJECT, found, "Do not use this GPU; it has to be replaced."))
    elif gpu.repair_pending:
        found = f"{name}: damaged memory rows are not replaced yet"
        findings.append(
            Finding.warning(_SUBJECT, found, "Reset the GPU (nvidia-smi --gpu-reset) or restart the machine.")
        )
    return findings


def check_architectures(capabilities: Sequence[tuple[int, int]], architectures: Sequence[str]) -> list[Finding]:
    """Return a problem for each GPU for which this build of torch has no kernels.

    Args:
        capabilities: the compute capabilities of the GPUs that torch sees.
        architectures: the architectures that torch is built for, such as ``sm_90`` and ``compute_90``.
    """
    return [
        Finding.problem(
            _SUBJECT,
            f"cuda:{index} has compute capability {major}.{minor}, but torch is built for {', '.join(architectures)}",
            "Install a build of torch for this GPU; older and newer GPUs need other builds.",
        )
        for index, (major, minor) in enumerate(capabilities)
        if not any(_serves(each, major, minor) for each in architectures)
    ]


def _serves(architecture: str, major: int, minor: int) -> bool:
    """Return whether code for an architecture runs on a GPU: machine code on the same major version, PTX on all newer ones."""
    kind, _, number = architecture.partition("_")
    digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
    if not digits.isdigit():
        return False
    own = int(digits[:-1] or 0), int(digits[-1])
    return own <= (major, minor) if kind == "compute" else own[0] == major and own[1] <= minor


def _is_set(value: str) -> bool:
    return value not in ("", "0")


def _is_zero(value: str) -> bool:
    return value == "0"


def _is_verbose(value: str) -> bool:
    return value.upper() in {"INFO", "TRACE"}


def _is_loopback(value: str) -> bool:
    return any(name.lstrip("=").strip() in {"lo", "lo0"} for name in value.split(",") if not value.startswith("^"))


def _is_detail(value: str) -> bool:
    return value.upper() == "DETAIL"


# For each variable: whether a value hurts, and why.
_VARIABLES: Final[Mapping[str, tuple[Callable[[str], bool], str]]] = {
    "NCCL_P2P_DISABLE": (_is_set, "GPUs of one machine communicate through CPU memory"),
    "NCCL_SHM_DISABLE": (_is_set, "GPUs of one machine may communicate through the network"),
    "NCCL_IB_DISABLE": (_is_set, "machines communicate through TCP instead of InfiniBand or RoCE"),
    "NCCL_NET_GDR_LEVEL": (lambda value: value.upper() in {"0", "LOC"}, "the network copies through CPU memory"),
    "NCCL_SOCKET_IFNAME": (_is_loopback, "machines cannot reach each other through the loopback interface"),
    "NCCL_DEBUG": (_is_verbose, "NCCL writes many lines to the output of each rank"),
    "NCCL_ALGO": (_is_set, "NCCL cannot choose the fastest algorithm for each size"),
    "NCCL_PROTO": (_is_set, "NCCL cannot choose the fastest protocol for each size, and a wrong one corrupts data"),
    "CUDA_LAUNCH_BLOCKING": (_is_set, "the host waits for every kernel"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (_is_set, "every tensor is allocated and freed by the driver"),
    "TORCH_NCCL_BLOCKING_WAIT": (_is_set, "the host waits for every collective"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (_is_zero, "ranks wait forever for a rank that has failed"),
    "TORCH_NCCL_ENABLE_MONITORING": (_is_zero, "a collective that hangs may never time out"),
    "TORCH_NCCL_ENABLE_TIMING": (_is_set, "events are recorded for every collective"),
    "TORCH_DISTRIBUTED_DEBUG": (_is_detail, "every collective is preceded by a check on all ranks"),
}


def check_variables(environ: Mapping[str, str]) -> list[Finding]:
    """Return a finding about the environment variables of CUDA, NCCL and torch, with one warning for each that hurts."""
    known = {name: environ[name] for name in _VARIABLES if name in environ}
    findings = [
        Finding.warning("GPU variables", f"{name}={value}: {_VARIABLES[name][1]}", f"unset {name}, unless you need it.")
        for name, value in known.items()
        if _VARIABLES[name][0](value)
    ]
    if findings:
        return findings
    nccl = sorted(f"{name}={value}" for name, value in environ.items() if name.startswith(("NCCL_", "TORCH_NCCL_")))
    return [Finding.ok("GPU variables", some_names(nccl, _MOST_SHOWN) if nccl else "no variable of NCCL is set")]
