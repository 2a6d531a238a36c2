"""``stratagem init``: create a small project that trains and passes its test."""
