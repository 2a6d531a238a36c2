"""Validation and test metrics, including for ranks with different numbers of batches."""
