"""What a strategy does before ``prepare``: set up the process, and build components from configurations."""
