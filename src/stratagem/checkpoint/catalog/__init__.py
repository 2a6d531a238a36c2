"""Inspect and order a run's checkpoints, find the newest one, and delete old ones."""
