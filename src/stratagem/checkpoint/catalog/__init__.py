"""The checkpoints of a run: inspect them, order them, find the newest, and delete those that are not kept."""
