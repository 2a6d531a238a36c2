"""DeepSpeed: its options are read without it; what drives it is loaded by name when the strategy is built."""

from stratagem.engines.deepspeed.strategy import DeepSpeedStrategy

__all__ = ["DeepSpeedStrategy"]
