"""Keep secrets out of what is printed and stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["mask_secrets", "mask_text"]

_MASK = "***"
_SECRET_NAME = re.compile("TOKEN|KEY|SECRET|PASS|CRED", re.IGNORECASE)
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#]*@")
_QUERY_SECRET = re.compile(
    r"(?P<name>[?&][^=&#\s]*(?:TOKEN|KEY|SECRET|PASS|CRED|SIG)[^=&#\s]*=)[^&#\s]*", re.IGNORECASE
)


def mask_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that can be logged: what stands under a name like a secret's is replaced by ``***``.

    A name counts if it contains TOKEN, KEY, SECRET, PASS or CRED in any case; under it every text and number is
    masked, at any depth of mappings and lists. In every other text the passwords inside URLs are masked. It masks too
    much (``custom_keys``) rather than too little.
    """
    return {name: _mask(value, secret=_is_secret(name)) for name, value in values.items()}


def mask_text(text: str) -> str:
    """Return the text with the user information, and secrets in the query, of every URL in it masked."""
    return _QUERY_SECRET.sub(rf"\g<name>{_MASK}", _USER_INFO.sub(rf"\g<scheme>{_MASK}@", text))


def _is_secret(name: object) -> bool:
    return _SECRET_NAME.search(str(name)) is not None


def _mask(value: Any, *, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _mask(inner, secret=secret or _is_secret(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        masked = [_mask(inner, secret=secret) for inner in value]
        return tuple(masked) if isinstance(value, tuple) else masked
    if value is None or isinstance(value, bool):
        return value
    if secret:
        return _MASK
    return mask_text(value) if isinstance(value, str) else value
