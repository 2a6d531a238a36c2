"""`stratagem doctor` on a machine with GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from stratagem.cli.doctor.gpus import check_gpus
from stratagem.cli.doctor.nvidia import Driver, read_driver


def test_the_driver_and_the_gpus_are_found(cuda: torch.device) -> None:
    """The driver reports its version, and at least as many GPUs as torch sees, with the same names."""
    driver = read_driver()
    assert isinstance(driver, Driver), driver
    assert driver.version
    assert driver.cuda is not None
    assert len(driver.gpus) >= torch.cuda.device_count()
    assert torch.cuda.get_device_name(cuda) in {gpu.name for gpu in driver.gpus}
    assert all(gpu.memory_mib > 1000 and gpu.uuid.startswith(("GPU-", "MIG-")) for gpu in driver.gpus)


def test_the_build_of_torch_matches(cuda: torch.device) -> None:
    """Since torch can use the GPU, neither the driver nor the architecture is a problem."""
    torch.ones(1, device=cuda)
    findings = check_gpus()
    assert findings[0].verdict.value == "ok", findings[0]
    assert not [each for each in findings if "compute capability" in each.found]


def test_the_command_measures_the_gpus(cuda: torch.device, tmp_path: Path) -> None:
    """The command tries every GPU and, with two or more, measures the bandwidth of an all-reduce with NCCL."""
    done = subprocess.run(
        [sys.executable, "-m", "stratagem", "doctor", "--work-dir", str(tmp_path), "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    rows = json.loads(done.stdout)
    found = [" ".join(map(str, row.values())) for row in rows]
    assert any(f"{cuda} works" in row for row in found), found
    expected = "bus bandwidth" if torch.cuda.device_count() > 1 else "one device"
    assert any("all-reduce" in row and expected in row for row in found), found
