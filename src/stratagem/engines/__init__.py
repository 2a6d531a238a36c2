"""Strategies for external training engines. Each engine is imported when its strategy is used."""
