"""Read configuration files in Python, YAML, JSON and TOML, with their bases and placeholders."""
