"""Checkpoints and weights that are not on the local disk: URLs, object stores and model hubs."""
