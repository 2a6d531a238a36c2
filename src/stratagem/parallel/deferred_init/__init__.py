"""Build a model on the meta device and initialize it afterwards as one process would."""
