"""Where the time of a training step goes: named ranges, operators, collectives, reads by the host, and advice."""
