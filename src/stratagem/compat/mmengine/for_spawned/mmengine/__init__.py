"""Imported instead of MMEngine by spawned processes; refers to ``stratagem.compat.mmengine``."""

import stratagem.compat.mmengine  # noqa: F401
