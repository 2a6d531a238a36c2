"""ColossalAI's Booster as a strategy: options, placement, optimizer wrapper and state."""
