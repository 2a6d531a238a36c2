"""Compare plans with real runs, which a separate implementation measures."""
