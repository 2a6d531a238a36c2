"""The strategy for DeepSpeed. The library itself is imported when the strategy is built."""

from stratagem.engines.deepspeed.strategy import DeepSpeedStrategy

__all__ = ["DeepSpeedStrategy"]
