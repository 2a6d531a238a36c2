"""Which checkpoints a run has: their order, the newest one, what each records, and which are kept."""
