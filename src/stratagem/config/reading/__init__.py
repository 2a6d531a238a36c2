"""Read configuration files: Python, YAML, JSON and TOML, with their bases and placeholders."""
