"""The strategy for ColossalAI: options, plugins, placement, optimizer wrapper and state."""
