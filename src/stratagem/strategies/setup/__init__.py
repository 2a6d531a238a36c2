"""What a strategy does before it prepares anything: the process environment and building from configurations."""
