"""Start a command in several processes."""
