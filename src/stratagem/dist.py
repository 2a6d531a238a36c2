"""The public name of :mod:`stratagem.distributed`, as in ``from stratagem.dist import get_rank``."""

from stratagem.distributed import *  # noqa: F403
from stratagem.distributed import __all__ as __all__
