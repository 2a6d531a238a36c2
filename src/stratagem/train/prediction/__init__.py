"""Predictions of a model in the order of the data, in memory or in a file."""
