"""Inspect and order a run's checkpoints, find the newest one, and delete the ones that are not kept."""
