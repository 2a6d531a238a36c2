"""The state and services of a run: progress, history, locks, signals, writing checkpoints, stopping all ranks."""
