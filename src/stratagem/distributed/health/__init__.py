"""Detect ranks that have exited or hang."""
