"""Where a run starts from: a checkpoint, a relaunch, a rollback, a requeued job."""
