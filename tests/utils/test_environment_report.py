"""Test the environment report."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import stratagem
from stratagem.utils import collect_env, environment_report


def test_the_report_contains_the_loaded_versions() -> None:
    """The report contains the versions that are actually loaded."""
    report = collect_env()
    assert report["stratagem"] == stratagem.__version__
    assert report["PyTorch"] == torch.__version__
    assert report["NumPy"] == np.__version__
    assert report["Python"].startswith(".".join(str(part) for part in sys.version_info[:3]))
    assert all(isinstance(value, str) and value and "\n" not in value for value in report.values())


def test_the_report_contains_no_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report contains no environment variables, because they may hold secrets."""
    monkeypatch.setenv("SOME_VARIABLE", "its-secret-value")
    assert "its-secret-value" not in repr(collect_env())


def test_a_missing_compiler_is_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gcc, the report has no compiler line."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "GCC" not in collect_env()


def test_a_compiler_that_hangs_times_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that does not respond is reported as unknown after a timeout."""
    hanging = tmp_path / "gcc"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(hanging))
    monkeypatch.setattr(environment_report, "_COMPILER_TIMEOUT_S", 0.05)
    assert collect_env()["GCC"] == "unknown"


def test_only_the_first_line_of_the_compiler_output_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first line of the compiler's output is shown."""
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/gcc")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="gcc 12\nFree software\n"))
    assert collect_env()["GCC"] == "gcc 12"


def test_missing_packages_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optional packages are listed only if they are installed."""

    def version(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = collect_env()
    assert report["TorchMetrics"] == "1.2"
    assert "TorchVision" not in report


def test_unknown_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the platform does not report its memory, the report contains "unknown"."""

    def reject(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(environment_report.os, "sysconf", reject)
    assert collect_env()["Memory"] == "unknown"


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Make torch report two devices of the given type."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: SimpleNamespace(type=kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_any_accelerator_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator is queried from torch, whatever its type."""
    pretend_accelerator(monkeypatch, "xpu")
    assert collect_env()["Accelerator"] == "2 x xpu"


def test_cuda_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, the report lists the devices and the toolkit versions."""
    pretend_accelerator(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"H100 #{index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    report = collect_env()
    assert report["Accelerator"] == "H100 #0, H100 #1"
    assert report["CUDA"] == "13.0"
    assert report["cuDNN"] == "91000"


def test_a_machine_without_an_accelerator_reports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator, the report contains "none"."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert collect_env()["Accelerator"] == "none"


@pytest.mark.slow
def test_importing_utils_does_not_import_torch() -> None:
    """Importing ``stratagem.utils`` does not import torch or NumPy, and every public name is available."""
    code = (
        "import sys, stratagem.utils as utils; "
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules); "
        "assert set(utils.__all__) <= set(dir(utils)); "
        "utils.mask_text('x'); "
        "assert 'torch' not in sys.modules; "
        "assert all(getattr(utils, name) for name in utils.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_utils_has_no_undeclared_names() -> None:
    """Accessing a misspelled helper raises an AttributeError, as for any module."""
    with pytest.raises(AttributeError, match="has no attribute 'collect_envs'"):
        _ = stratagem.utils.collect_envs  # type: ignore[attr-defined]
