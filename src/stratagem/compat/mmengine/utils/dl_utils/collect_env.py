"""Information about hardware and software."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from stratagem.compat.mmengine.device import is_cuda_available, is_musa_available
from stratagem.compat.mmengine.utils.dl_utils.parrots_wrapper import _get_cuda_home, get_build_config
from stratagem.compat.mmengine.version import __version__
from stratagem.utils import collect_env as collect_stratagem_env

__all__ = ["collect_env"]

_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")


def collect_env() -> OrderedDict[str, Any]:
    """Return the versions of Python, PyTorch and related packages, and the devices, under MMEngine's names."""
    found = collect_stratagem_env()
    report: OrderedDict[str, Any] = OrderedDict()
    report["sys.platform"] = sys.platform
    report["Python"] = sys.version.replace("\n", "")
    report["CUDA available"] = is_cuda_available()
    report["MUSA available"] = is_musa_available()
    report["numpy_random_seed"] = np.random.get_state()[1][0]  # type: ignore[index]
    if report["CUDA available"]:
        devices = defaultdict(list)
        for index in range(torch.cuda.device_count()):
            devices[torch.cuda.get_device_name(index)].append(str(index))
        report.update((f"GPU {','.join(indices)}", name) for name, indices in devices.items())
        report["CUDA_HOME"] = _get_cuda_home()
        report["CUDA"] = found.get("CUDA")
        report["cuDNN"] = found.get("cuDNN")
    report["GCC"] = found.get("GCC", "n/a")
    report["PyTorch"] = torch.__version__
    report["PyTorch compiling details"] = get_build_config()
    if "TorchVision" in found:
        report["TorchVision"] = found["TorchVision"]
    report.update(("OpenCV", item) for item in map(_version, _OPENCV) if item is not None)
    report["MMEngine"] = __version__
    report["Stratagem"] = found["stratagem"]
    return report


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
