"""The strategy for DeepSpeed. DeepSpeed is imported when the strategy is built."""

from stratagem.engines.deepspeed.strategy import DeepSpeedStrategy

__all__ = ["DeepSpeedStrategy"]
