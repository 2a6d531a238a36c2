"""The strategies: change one, and the rest of a run stays as it is."""

from stratagem.strategies.base import BaseStrategy
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.ddp import DDPStrategy
from stratagem.strategies.engines.colossalai.strategy import ColossalAIStrategy
from stratagem.strategies.engines.deepspeed import DeepSpeedStrategy
from stratagem.strategies.fsdp import FSDPStrategy
from stratagem.strategies.single import SingleDeviceStrategy

__all__ = [
    "BaseStrategy",
    "ComposedStrategy",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "ColossalAIStrategy",
    "FSDPStrategy",
    "SingleDeviceStrategy",
]
