"""State as nested dictionaries: flatten it, name its tensors, describe their shards, load it into a model."""
