"""Declare compiled operators that the trainings do not call, but without which packages cannot be imported.

Python runs this file at startup in every process of the trainings, also in spawned ones, because its folder is on their
PYTHONPATH. The build of torchvision that pip installs cannot be imported next to a CPU build of torch. There is no build of
the operators of mmcv for this torch, and mmcv-lite has none; mmsegmentation imports them, and its FCN calls none.
"""

import os
import sys
import types
from importlib.machinery import ModuleSpec

import torch

if not torch.cuda.is_available():
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class MissingOperators(types.ModuleType):
    """A module that has every name, as functions that raise when they are called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"the operator {name} of mmcv is not installed")

        return missing


if os.environ.get("DECLARE_MMCV_OPERATORS") == "1":
    operators = MissingOperators("mmcv._ext")
    operators.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = operators
