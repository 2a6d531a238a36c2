"""``stratagem ckpt``: inspect, verify, compare, convert and prune checkpoints."""
