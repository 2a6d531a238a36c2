"""Declare the two operators without which torchvision cannot be imported next to a CPU build of torch.

timm requires torchvision, and transformers imports it if it is installed. The build of torchvision that pip installs cannot
load its compiled operators next to a CPU build of torch, and fails to import because these two are unknown. No test calls
them.
"""

import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
