"""Charts in the terminal and as PNG files."""
