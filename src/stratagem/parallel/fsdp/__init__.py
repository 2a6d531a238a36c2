"""Sharding with torch's ``fully_shard``: options, wrap policies, device meshes, tensor parallelism and recomputation."""
