"""Setting up a strategy: the process environment, and building components from configurations."""
