"""Plan a training job: the memory, communication and computation of each rank at any world size, without running it."""
