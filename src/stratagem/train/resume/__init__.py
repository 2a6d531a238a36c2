"""Resume a run from a checkpoint, after a relaunch, a rollback or a preemption."""
