"""Detect ranks that have died or hang."""
