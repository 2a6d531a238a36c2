"""Validation and test metrics, also when ranks have different numbers of batches."""
