"""``stratagem parity``: train the same steps in several ways and report where they differ."""
