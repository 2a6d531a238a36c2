"""What a strategy saves and restores."""
