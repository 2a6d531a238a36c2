"""Saving, loading and resuming the state of a strategy."""
