"""Optimizer wrappers and their constructors."""

from stratagem.compat.mmengine.optim.optimizer.amp_optimizer_wrapper import AmpOptimWrapper
from stratagem.compat.mmengine.optim.optimizer.apex_optimizer_wrapper import ApexOptimWrapper
from stratagem.compat.mmengine.optim.optimizer.base import BaseOptimWrapper
from stratagem.compat.mmengine.optim.optimizer.builder import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIMIZERS,
    build_optim_wrapper,
)
from stratagem.compat.mmengine.optim.optimizer.default_constructor import DefaultOptimWrapperConstructor
from stratagem.compat.mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper
from stratagem.compat.mmengine.optim.optimizer.optimizer_wrapper_dict import OptimWrapperDict
from stratagem.compat.mmengine.optim.optimizer.zero_optimizer import ZeroRedundancyOptimizer

__all__ = [
    "OPTIMIZERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "AmpOptimWrapper",
    "ApexOptimWrapper",
    "BaseOptimWrapper",
    "DefaultOptimWrapperConstructor",
    "OptimWrapper",
    "OptimWrapperDict",
    "ZeroRedundancyOptimizer",
    "build_optim_wrapper",
]
