"""Eleven bugs that make a training wrong without an error, injected into three models from the configuration."""
