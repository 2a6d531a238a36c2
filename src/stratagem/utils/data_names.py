"""Names that came from a data file, which must never be able to choose what code runs."""

from __future__ import annotations

import re
from typing import final

__all__ = ["DataName", "is_dotted_name"]

_DOTTED = re.compile(r"\w+(?:[.:]\w+)+")


def is_dotted_name(text: str) -> bool:
    """Tell whether ``text`` could be the dotted path of something importable, such as ``os.system``."""
    return _DOTTED.fullmatch(text) is not None


@final
class DataName(str):
    """A text from a data file that could choose what is imported: a dotted path, or the name of a scope.

    It is a ``str`` in every respect. Registries look at its class and do not import what it names, unless the program
    allowed its package. The class survives merging, copying and pickling, so the rule travels with the value.
    """

    __slots__ = ()
