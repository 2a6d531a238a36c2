"""``stratagem doctor``: check whether this machine is ready for training, and suggest how to fix problems."""
