"""What `stratagem doctor` reports about GPUs, given the output of nvidia-smi or the answers of NVML."""

from __future__ import annotations

import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stratagem.cli.doctor import command
from stratagem.cli.doctor.finding import Verdict
from stratagem.cli.doctor.gpus import (
    check_architectures,
    check_build,
    check_gpus,
    check_health,
    check_models,
    check_variables,
)
from stratagem.cli.doctor.nvidia import Driver, Gpu, read_driver
from stratagem.cli.doctor.ranks import check_bandwidth
from stratagem.cli.doctor.record import RecordRequest
from stratagem.hardware import read_measured_links

SUMMARY = """\
Thu Nov 26 10:12:08 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.90.07              Driver Version: 550.90.07      CUDA Version: 12.4     |
|-----------------------------------------+------------------------+----------------------+
"""
# The values of: uuid, name, driver_version, memory.total, reasons for clocks, ECC errors, pending repair, failed repair.
TWO_H200 = """\
GPU-2b9f0e55-7d06-2c9a-9a1f-0f2a4be1c001, NVIDIA H200, 550.90.07, 143771, 0x0000000000000001, 0, No, No
GPU-2b9f0e55-7d06-2c9a-9a1f-0f2a4be1c002, NVIDIA H200, 550.90.07, 143771, 0x0000000000000040, 3, Yes, No
"""
RTX = "GPU-77aa0e55-7d06-2c9a-9a1f-0f2a4be1c003, NVIDIA GeForce RTX 4090, 550.90.07, 24564, 0x0000000000000004, [N/A]\n"

HEALTHY = Gpu(uuid="GPU-1", name="NVIDIA H200", memory_mib=143771, uncorrected_errors=0)
DRIVER = Driver(version="550.90.07", cuda=(12, 4), gpus=(HEALTHY,))


@pytest.fixture(autouse=True)
def _without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make NVML's bindings unavailable unless a test provides them."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


def install_nvidia_smi(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, output: str, unknown: Sequence[str] = ()
) -> None:
    """Put an nvidia-smi on the path that prints ``output`` for a query, and rejects queries with fields in ``unknown``."""
    script = folder / "nvidia-smi"
    (folder / "summary").write_text(SUMMARY)
    (folder / "output").write_text(output)
    cases = "".join(
        f'  *{field}*) echo "Field \\"{field}\\" is not a valid field to query."; exit 2;;\n' for field in unknown
    )
    script.write_text(
        f'#!/bin/sh\ncase "$1" in\n{cases}  --query*) cat {folder}/output;;\n  *) cat {folder}/summary;;\nesac\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_output_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions, the GPUs, and their throttling and memory errors are read from nvidia-smi."""
    install_nvidia_smi(tmp_path, monkeypatch, output=TWO_H200)
    driver = read_driver()
    assert isinstance(driver, Driver)
    assert (driver.version, driver.cuda) == ("550.90.07", (12, 4))
    first, second = driver.gpus
    assert first == Gpu(
        uuid="GPU-2b9f0e55-7d06-2c9a-9a1f-0f2a4be1c001",
        name="NVIDIA H200",
        memory_mib=143771,
        clock_reasons=1,
        uncorrected_errors=0,
    )
    assert (second.clock_reasons, second.uncorrected_errors, second.repair_pending, second.repair_failed) == (
        64,
        3,
        True,
        False,
    )


def test_an_older_nvidia_smi_without_some_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nvidia-smi rejects fields of newer versions, the others are asked for; unsupported values are unknown."""
    install_nvidia_smi(
        tmp_path, monkeypatch, output=RTX, unknown=["clocks_event_reasons.active", "remapped_rows.pending"]
    )
    driver = read_driver()
    assert isinstance(driver, Driver)
    assert driver.gpus == (
        Gpu(
            uuid="GPU-77aa0e55-7d06-2c9a-9a1f-0f2a4be1c003",
            name="NVIDIA GeForce RTX 4090",
            memory_mib=24564,
            clock_reasons=4,
        ),
    )


class NVMLError(Exception):
    """The error that NVML's bindings raise."""


def nvml(**replaced: Any) -> Any:
    """Return stand-ins for the functions of NVML's bindings, for one GPU that is too hot."""

    def unsupported(*_: Any) -> Any:
        raise NVMLError("Not Supported")

    answers = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"580.65.06",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda _: "NVIDIA A100-SXM4-80GB",
        "nvmlDeviceGetUUID": lambda _: "GPU-a",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 * 2**30),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0x20,
        "nvmlDeviceGetTotalEccErrors": unsupported,
        "nvmlDeviceGetRemappedRows": lambda _: (0, 1, 0, 1),
    }
    return SimpleNamespace(**{**answers, **replaced})


def test_the_answers_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NVML's bindings, nvidia-smi is not needed; values that a GPU does not support are unknown."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert read_driver() == Driver(
        version="580.65.06",
        cuda=(13, 0),
        gpus=(
            Gpu(uuid="GPU-a", name="NVIDIA A100-SXM4-80GB", memory_mib=81920, clock_reasons=0x20, repair_failed=True),
        ),
    )


def test_nvml_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """If NVML cannot be initialized, the reason is its message."""

    def fail() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=fail))
    assert read_driver() == "NVML cannot be initialized: Driver Not Loaded"


def test_a_machine_without_a_gpu_has_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, a single line gives the reason, and it is not a problem."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = check_gpus()
    assert finding.verdict is Verdict.OK
    assert finding.found == "none: nvidia-smi is not installed, and torch is a CPU build"


def test_a_machine_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build of torch, the models and the health of each GPU are reported."""
    install_nvidia_smi(tmp_path, monkeypatch, output=TWO_H200)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    findings = check_gpus()
    assert [each.verdict.value for each in findings] == ["ok", "ok", "warning", "problem", "warning", "warning"]
    assert findings[0].found == ("2 GPU(s), driver 550.90.07, which supports CUDA 12.4; torch is built for CUDA 12.8")
    assert findings[1].found == "2 x NVIDIA H200 (140 GiB)"
    assert "GPU 1 (NVIDIA H200, GPU-2b9f0e55" in findings[2].found
    assert "its temperature (hardware)" in findings[2].found
    assert "3 uncorrected memory errors since the driver was loaded" in findings[3].found
    assert "NCCL_P2P_DISABLE=1" in findings[5].found


@pytest.mark.parametrize(
    ("build", "is_rocm", "verdict", "text"),
    [
        ("12.4", False, Verdict.OK, "torch is built for CUDA 12.4"),
        ("12.9", False, Verdict.OK, "torch is built for CUDA 12.9"),  # minor versions are compatible
        ("11.8", False, Verdict.OK, "torch is built for CUDA 11.8"),
        ("13.0", False, Verdict.PROBLEM, "which supports CUDA 12.4; torch is built for CUDA 13.0"),
        (None, False, Verdict.PROBLEM, "torch is built for the CPU"),
        (None, True, Verdict.PROBLEM, "torch is built for ROCm"),
    ],
)
def test_builds_and_drivers(build: str | None, is_rocm: bool, verdict: Verdict, text: str) -> None:
    """A build of torch for a newer major version of CUDA than the driver supports, or without CUDA, is a problem."""
    finding = check_build(DRIVER, build, is_rocm=is_rocm)
    assert finding.verdict is verdict
    assert text in finding.found
    assert verdict is Verdict.OK or "CUDA 12.4 or older" in finding.advice


def test_unequal_gpus() -> None:
    """GPUs of different models or memory sizes are a warning that lists them."""
    small = Gpu(uuid="GPU-2", name="NVIDIA A100-PCIE-40GB", memory_mib=40960)
    finding = check_models([HEALTHY, HEALTHY, small])
    assert finding.verdict is Verdict.WARNING
    assert finding.found == "2 x NVIDIA H200 (140 GiB), 1 x NVIDIA A100-PCIE-40GB (40 GiB)"


@pytest.mark.parametrize("reasons", [0x0, 0x1, 0x2, 0x4, 0x10])
def test_normal_clocks(reasons: int) -> None:
    """An idle GPU, clocks that the user has set, and the power limit are not reported."""
    assert check_health(0, Gpu(uuid="GPU-1", name="H200", clock_reasons=reasons)) == []


def test_a_failed_repair_of_memory() -> None:
    """Memory rows that could not be replaced are a problem."""
    (finding,) = check_health(0, Gpu(uuid="GPU-1", name="H200", repair_failed=True, repair_pending=True))
    assert finding.verdict is Verdict.PROBLEM


@pytest.mark.parametrize(
    ("architectures", "works"),
    [
        (["sm_80", "sm_86"], True),  # machine code of the same major version
        (["sm_89"], False),
        (["sm_90", "sm_90a"], False),
        (["sm_70", "compute_70"], True),  # PTX is compiled for newer GPUs
        (["compute_90"], False),
        (["sm_75", "sm_120"], False),
    ],
)
def test_architectures(architectures: list[str], works: bool) -> None:
    """Whether a build of torch has kernels for a GPU of compute capability 8.6."""
    findings = check_architectures([(8, 6)], architectures)
    assert (findings == []) is works
    assert works or "compute capability 8.6" in findings[0].found


@pytest.mark.parametrize(
    "variable",
    [
        "NCCL_P2P_DISABLE=1", "NCCL_IB_DISABLE=1", "NCCL_DEBUG=INFO", "NCCL_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME==lo",
        "CUDA_LAUNCH_BLOCKING=1", "TORCH_NCCL_BLOCKING_WAIT=1", "TORCH_NCCL_ASYNC_ERROR_HANDLING=0",
        "TORCH_DISTRIBUTED_DEBUG=DETAIL", "NCCL_NET_GDR_LEVEL=LOC",
    ],
)  # fmt: skip
def test_variables_that_hurt(variable: str) -> None:
    """A variable that slows down training or hides errors is a warning with its value."""
    name, _, value = variable.partition("=")
    (finding,) = check_variables({name: value, "HOME": "/root"})
    assert finding.verdict is Verdict.WARNING
    assert finding.found.startswith(f"{name}={value}: ")
    assert f"unset {name}" in finding.advice


def test_harmless_variables() -> None:
    """Variables with other values are listed without a warning."""
    (finding,) = check_variables(
        {"NCCL_P2P_DISABLE": "0", "NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "^docker,lo", "CUDA_LAUNCH_BLOCKING": ""}
    )
    assert finding.verdict is Verdict.OK
    assert finding.found == "NCCL_DEBUG=WARN, NCCL_P2P_DISABLE=0, NCCL_SOCKET_IFNAME=^docker,lo"


@pytest.mark.parametrize(
    ("seconds", "one_host", "verdict"),
    [(0.001, True, Verdict.OK), (0.1, True, Verdict.WARNING), (0.1, False, Verdict.OK)],
)
def test_bandwidth_of_an_all_reduce(seconds: float, one_host: bool, verdict: Verdict) -> None:
    """Two GPUs of one machine that exchange less than 5 GB/s are a warning; with a network, there is no threshold."""
    finding = check_bandwidth("2 ranks, nccl on cuda", 2, 256 * 2**20, seconds, one_host=one_host)
    assert finding.verdict is verdict
    # 2 (n - 1) / n = 1 for two ranks.
    assert f"256 MiB in {1e3 * seconds:.1f} ms (bus bandwidth {0.268435456 / seconds:.1f} GB/s)" in finding.found


def test_one_gpu_is_not_shared_by_the_ranks_of_the_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with one GPU, no ranks are started, since they would share it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    (finding,) = command._check_local_ranks(2)
    assert finding.verdict is Verdict.OK
    assert "one device" in finding.found


@pytest.mark.slow
def test_a_machine_with_one_gpu_records_its_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without other GPUs, the record has no link, and plans then use the data sheets."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    file = tmp_path / "links.json"
    command._check_local_ranks(2, RecordRequest(file=file, work_dir=tmp_path))
    measured = read_measured_links(file)
    assert (measured.inside, measured.across) == (None, None)
    assert measured.storage is not None


def test_no_more_ranks_are_started_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --nproc 8 on a machine with 4 GPUs, 4 ranks measure the all-reduce."""
    started: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(command, "launch_locally", lambda nproc, _: started.append(nproc))
    monkeypatch.setattr(command, "read_findings", lambda _: [])
    command._check_local_ranks(8)
    assert started == [4]
