"""Mixed precision with NVIDIA's Apex, which torch's autocast has replaced."""

from stratagem.compat.mmengine.checks import not_supported
from stratagem.compat.mmengine.registry import OPTIM_WRAPPERS

__all__ = ["ApexOptimWrapper"]

ApexOptimWrapper = not_supported("ApexOptimWrapper", "AmpOptimWrapper")
OPTIM_WRAPPERS.register_module(module=ApexOptimWrapper)
