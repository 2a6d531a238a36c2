"""Mask secrets in everything that is displayed or saved.

In mappings, secrets are recognized by their keys; see :mod:`stratagem.utils.secrets.names`. In strings, the following are
masked: credentials and signatures in URLs, values that are assigned to the name of a secret, well-known forms of tokens, and
secrets that :mod:`stratagem.utils.secrets.values` has recorded. The time is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from stratagem.utils.secrets.names import is_secret_name, is_secret_parameter, is_special_token, is_strongly_secret_name
from stratagem.utils.secrets.values import remember_secret, replace_known_secrets

__all__ = ["mask_secrets", "mask_text", "mask_tokens", "mask_urls"]

_MASK = "***"
# Match up to the last @ before the path. A slash in a password is not valid in a URL, but it occurs in practice.
_USER_INFO = re.compile(
    r"://(?P<info>[^\s/?#@:\[\"'<>]{0,512}:(?!\d{0,5}(?:[/?#\s\"'<>]|$))[^\s@\"'<>]{0,128}(?=@)"
    r"|[^\s/?#\"'<>]{1,2048}(?=@))(?P<more>(?:@[^\s/?#@\"'<>]{0,512}(?=@))*)@"
)
_PARAMETER = re.compile(
    r"(?P<name>(?:[?&#;]|%3F|%26)[^=&#?;%\s\"'<>]{1,128})(?P<equals>=|%3D)(?P<value>(?:(?!%26|%23)[^\s&#;\"'<>])*)",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"(?<![\w.])(?P<name>[A-Za-z_][\w.-]{0,127}+)(?P<middle>(?:\\?[\"'])?[ ]{0,3}(?P<sign>[=:])[ ]{0,3})"
    r"(?:(?P<quote>b?\\?(?P<mark>[\"']))(?P<quoted>[^\n]{0,4096}?)(?P<end>\\?(?P=mark)|(?=\.\.\.|\n|\Z))"
    r"|(?P<bare>[^\s,;&)}\]\"'(\[<{][^\s,;&)}\]\"'(\[<{]*))"
)
_HEADER = re.compile(
    r"(?P<name>\b(?:authorization|cookie|x-api-key)(?:\\?[\"'])?[ ]{0,3}[:=][ ]{0,3}(?:b?\\?[\"'])?(?:(?:bearer|basic|token)[ ])?"
    r"|\bbearer[ ])(?P<value>(?=[^\s\"',;\\]*[\d=])[^\s\"',;\\]{8,})",
    re.IGNORECASE,
)
# The names of all secrets match this pattern, so strings without a match are not searched further.
_HINT = re.compile("pass|secret|cred|token|auth|key|cookie|bearer|dsn|jwt|pw|connection|uid", re.IGNORECASE)
# Tokens with a well-known prefix.
_TOKEN = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|sk-(?=[\w-]*\d)[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]{0,16000}(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
)
_PLAIN_WORDS = frozenset({"none", "true", "false", "null", "", _MASK})


def mask_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that is safe to log, in which strings under the name of a secret become ``***``.

    Other strings are masked by :func:`mask_text`. All values under such a name are masked, including numbers,
    unless the name is ambiguous and the mapping has a ``type``, so that it describes an object.
    """
    return {name: _mask(value, _secrecy(name, "")) for name, value in values.items()}


def mask_text(text: str) -> str:
    """Return ``text`` with each secret replaced by ``***``."""
    text = mask_tokens(replace_known_secrets(text, lambda _: _MASK), _MASK)
    if "://" in text or "=" in text or "%3" in text:
        text = mask_urls(text, lambda _: _MASK)
    if _HINT.search(text):
        text = _ASSIGNED.sub(_masked_assignment, text)
    return text


def mask_tokens(text: str, mask: str) -> str:
    """Return the text with private keys, the values of authorization headers and well-known forms of tokens masked."""
    if _HINT.search(text):
        text = _HEADER.sub(lambda match: match["name"] + mask, text)
    return _TOKEN.sub(lambda _: mask, text)


def mask_urls(text: str, mask: Callable[[str], str]) -> str:
    """Return the text with the credentials and the secret query parameters of all URLs masked.

    Args:
        text: A URL, or any text that contains URLs.
        mask: Returns the replacement for a part of a URL, which may be the unchanged part.
    """
    if "://" in text and "@" in text:
        text = _USER_INFO.sub(lambda match: f"://{mask(match['info'] + match['more'])}@", text)

    def parameter(match: re.Match[str]) -> str:
        name = re.sub("^(?:[?&#;]|%3F|%26)", "", match["name"], flags=re.IGNORECASE)
        is_kept = not match["value"] or match["value"].startswith("{{")
        if is_kept or not is_secret_parameter(name):
            return match[0]
        return f"{match['name']}{match['equals']}{mask(match['value'])}"

    return _PARAMETER.sub(parameter, text)


def _masked_assignment(match: re.Match[str]) -> str:
    value = match["bare"] if match["quoted"] is None else match["quoted"]
    if not is_secret_name(match["name"]) or _is_plain_value(value):
        return match[0]
    if match["quoted"] is not None:
        return f"{match['name']}{match['middle']}{match['quote']}{_MASK}{match['end']}"
    in_prose = match["sign"] == ":" and match["middle"][0] not in "\"'\\"
    if in_prose and (len(value) < 8 or not any(map(str.isdigit, value))):
        return match[0]
    return f"{match['name']}{match['middle']}{_MASK}"


def _is_plain_value(value: str) -> bool:
    """Return whether a value is not a secret: a number, a placeholder, or a word such as None."""
    if value.lower().strip(".:") in _PLAIN_WORDS or value.startswith("{{") or is_special_token(value):
        return True
    try:
        float(value)
    except ValueError:
        return False
    return True


def _secrecy(name: object, inherited: str) -> str:
    """Return what to mask below a key: ``"all"`` values, ``"strings"`` if the name is ambiguous, or ``""`` for nothing."""
    if name == "type":
        return ""
    if is_strongly_secret_name(str(name)):
        return "all"
    return inherited or ("strings" if is_secret_name(str(name)) else "")


def _mask(value: Any, secrecy: str) -> Any:
    if isinstance(value, Mapping):
        below = "" if secrecy == "strings" and "type" in value else secrecy
        return {name: _mask(inner, _secrecy(name, below)) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        masked = [_mask(inner, secrecy) for inner in value]
        return tuple(masked) if isinstance(value, tuple) else masked
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return _MASK if secrecy == "all" and type(value) in (int, float) else value
    if secrecy and value and not (secrecy == "strings" and is_special_token(value)):
        remember_secret(value)
        return _MASK
    return mask_text(value)
