"""Run the current command as several ranks, on this machine or on a Ray cluster."""
