"""Set up a strategy: initialize the process environment, and build components from configurations."""
