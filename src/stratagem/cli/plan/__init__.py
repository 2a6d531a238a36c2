"""``stratagem plan``: estimate the memory, communication and time of a training job before renting devices."""
