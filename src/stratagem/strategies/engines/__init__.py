"""Engines of others that place and train a model: each is loaded when its strategy is built."""
