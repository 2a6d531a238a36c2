"""``stratagem doctor``: does this machine have what a training needs, and if not, what to do about it."""
