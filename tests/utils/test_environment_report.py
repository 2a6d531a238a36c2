"""The report of the environment."""

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


def test_report_names_the_versions_that_run() -> None:
    """The report shows what is really loaded."""
    report = collect_env()
    assert report["stratagem"] == stratagem.__version__
    assert report["PyTorch"] == torch.__version__
    assert report["NumPy"] == np.__version__
    assert report["Python"].startswith(".".join(str(part) for part in sys.version_info[:3]))
    assert all(isinstance(value, str) and value and "\n" not in value for value in report.values())


def test_report_shows_no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment is printed, since secrets live there."""
    monkeypatch.setenv("SOME_VARIABLE", "its-secret-value")
    assert "its-secret-value" not in repr(collect_env())


def test_a_machine_without_compiler_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gcc the line is left out."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "GCC" not in collect_env()


def test_a_compiler_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler wrapper that never answers does not hold the run up."""
    hanging = tmp_path / "gcc"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(hanging))
    monkeypatch.setattr(environment_report, "_COMPILER_TIMEOUT_S", 0.05)
    assert collect_env()["GCC"] == "unknown"


def test_a_compiler_answers_with_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the line with the version is shown."""
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/gcc")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="gcc 12\nFree software\n"))
    assert collect_env()["GCC"] == "gcc 12"


def test_packages_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optional packages appear only where they are installed."""

    def version(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = collect_env()
    assert report["TorchMetrics"] == "1.2"
    assert "TorchVision" not in report


def test_unknown_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that does not tell its memory gets "unknown"."""

    def refuse(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(environment_report.os, "sysconf", refuse)
    assert collect_env()["Memory"] == "unknown"


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Let torch tell of two devices of some kind."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: SimpleNamespace(type=kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_any_accelerator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator is asked from torch, whatever it is."""
    pretend_accelerator(monkeypatch, "xpu")
    assert collect_env()["Accelerator"] == "2 x xpu"


def test_cuda_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the devices and the versions of the toolkit are shown."""
    pretend_accelerator(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"H100 #{index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    report = collect_env()
    assert report["Accelerator"] == "H100 #0, H100 #1"
    assert report["CUDA"] == "13.0"
    assert report["cuDNN"] == "91000"


def test_a_machine_without_accelerator_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator the report says so."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert collect_env()["Accelerator"] == "none"


def test_importing_utils_does_not_import_torch() -> None:
    """Reading a configuration does not wait for torch or NumPy, and every offered name can be reached."""
    code = (
        "import sys, stratagem.utils as utils; "
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules); "
        "assert set(utils.__all__) <= set(dir(utils)); "
        "utils.mask_text('x'); "
        "assert 'torch' not in sys.modules; "
        "assert all(getattr(utils, name) for name in utils.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_utils_has_no_other_names() -> None:
    """A misspelled helper is an AttributeError as for any module."""
    with pytest.raises(AttributeError, match="has no attribute 'collect_envs'"):
        _ = stratagem.utils.collect_envs  # type: ignore[attr-defined]
