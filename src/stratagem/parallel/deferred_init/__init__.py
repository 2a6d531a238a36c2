"""Deferred initialization: build a model on the meta device, and compute its initial values later."""
