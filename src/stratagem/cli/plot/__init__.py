"""Draw line charts in the terminal and as PNG files."""
