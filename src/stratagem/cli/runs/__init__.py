"""Print, compare and follow runs."""
