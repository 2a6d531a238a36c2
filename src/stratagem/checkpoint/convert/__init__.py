"""Convert a checkpoint to another format, and compare two checkpoints."""
