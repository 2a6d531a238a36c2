"""Parameters sharded across ranks with ``fully_shard``, optionally with tensor parallelism."""
