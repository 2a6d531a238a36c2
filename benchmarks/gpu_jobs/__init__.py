"""The models, data and training loops of ``benchmarks/gpu.py``."""
