"""Read the launch environment, connect the ranks, and create the process group."""
