"""Flatten state trees, name their tensors, describe and gather shards, and load a state dict into a model."""
