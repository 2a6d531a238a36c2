"""Base classes of PyTorch's layers, under the names that MMEngine has for them."""

from __future__ import annotations

import torch
from torch.nn import SyncBatchNorm as SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm as _BatchNorm
from torch.nn.modules.conv import _ConvNd as _ConvNd
from torch.nn.modules.conv import _ConvTransposeMixin as _ConvTransposeMixin
from torch.nn.modules.instancenorm import _InstanceNorm as _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd as _AdaptiveAvgPoolNd
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd as _AdaptiveMaxPoolNd
from torch.nn.modules.pooling import _AvgPoolNd as _AvgPoolNd
from torch.nn.modules.pooling import _MaxPoolNd as _MaxPoolNd
from torch.utils.data import DataLoader as DataLoader

from stratagem.utils import import_object

__all__ = ["TORCH_VERSION", "DataLoader", "PoolDataLoader", "SyncBatchNorm", "get_build_config", "is_rocm_pytorch"]

TORCH_VERSION = torch.__version__
PoolDataLoader = DataLoader
SyncBatchNorm_ = SyncBatchNorm


def is_rocm_pytorch() -> bool:
    """Return whether PyTorch is built for AMD devices, and their libraries are installed."""
    return torch.version.hip is not None and import_object("torch.utils.cpp_extension:ROCM_HOME") is not None


def get_build_config() -> str:
    """Return how PyTorch was built."""
    return torch.__config__.show()


def _get_cuda_home() -> str | None:
    """Return the folder of CUDA, or of ROCm, or None."""
    name = "ROCM_HOME" if is_rocm_pytorch() else "CUDA_HOME"
    home: str | None = import_object(f"torch.utils.cpp_extension:{name}")
    return home
