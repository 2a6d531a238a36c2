"""Record the secrets that this process has encountered, and replace all their occurrences in strings."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import quote, quote_plus

from stratagem.utils.secrets.names import is_secret_name

__all__ = ["allow_in_texts", "known_secrets", "remember_placeholder", "remember_secret", "replace_known_secrets"]

_MAX_ENTRIES = 500
_MIN_LENGTH, _MIN_WORD_LENGTH = 6, 8
_MIN_PLACEHOLDER_LENGTH, _LONG_PLACEHOLDER_LENGTH = 8, 20
# Shorter values are only matched if they are not next to letters or digits.
_LONG_LENGTH = 12
_MIN_LINE_LENGTH = 16
# A truncated secret is matched if at least this many of its first characters remain.
_MIN_PREFIX_LENGTH = 6


def _words_in(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Common default values of secrets, which also occur in strings without secrets.
_COMMON = _words_in(
    "password passphrase secret anonymous default disabled changeme required undefined production development localhost "
    "training validation"
)

# A mapping from secrets to the environment variables that they came from, or "". The oldest entries are evicted first.
_secrets: dict[str, str] = {}
_placeholders: dict[str, str] = {}
_allowed: dict[str, None] = {}
# The environment and the secrets found in it. Cleared when a value is added.
_cache: list[tuple[dict[object, object], dict[str, str]]] = []


def remember_secret(value: str, variable: str = "") -> None:
    """Record a secret to mask in strings. Values that are too short or too common are ignored."""
    if _can_be_found(value):
        _remember(_secrets, value, variable)


def remember_placeholder(value: str, variable: str) -> None:
    """Mask the value of an environment variable that a configuration reads, unless it is clearly not a secret.

    Numbers, paths, URLs and short or simple words are not masked, since messages would be unreadable without them.
    """
    if is_secret_name(variable):
        if not _is_path(value):
            remember_secret(value, variable)
    elif len(value) >= _MIN_PLACEHOLDER_LENGTH and not any(map(str.isspace, value)) and _looks_random(value):
        _remember(_placeholders, value, variable)


def allow_in_texts(text: str) -> None:
    """Do not mask values that are substrings of this text, such as the folder of the run, except known secrets."""
    _remember(_allowed, text, None)


def known_secrets() -> Mapping[str, str]:
    """Return the known secrets, each with the environment variable that it came from, or ``""``."""
    # Compare the whole environment with the cached one, since strings are masked more often than variables are set.
    environment = getattr(os.environ, "_data", None)
    cached = next(iter(_cache), None)  # Another thread may clear the cache.
    if cached is not None and environment is not None and cached[0] == environment:
        return cached[1]
    found = _find_secrets()
    _cache.clear()
    _cache.append((dict(environment or {}), found))
    return found


def _find_secrets() -> dict[str, str]:
    environment = {
        value: name
        for name in os.environ
        if is_secret_name(name) and _can_be_found(value := os.environ.get(name, "")) and not _is_path(value)
    }
    placeholders = {
        value: name for value, name in _placeholders.items() if not any(value in allowed for allowed in _allowed)
    }
    secrets = {
        value: name or environment.get(value) or _placeholders.get(value, "") for value, name in _secrets.items()
    }
    return {**placeholders, **environment, **secrets}


def replace_known_secrets(text: str, replacement: Callable[[str], str], known: Mapping[str, str] | None = None) -> str:
    """Return ``text`` with every known secret replaced, including secrets that are escaped as in URLs, JSON or Python strings.

    Args:
        text: Any text.
        replacement: Returns the replacement of a secret, given the environment variable that it came from, or ``""``.
        known: The result of :func:`known_secrets`, to compute it once for many strings.
    """
    known = known_secrets() if known is None else known
    if not known:
        return text
    pattern, forms = _pattern(tuple(known))
    # A match that is only a truncated part of a secret is not a key of forms, so its variable is unknown.
    return pattern.sub(lambda match: replacement(known.get(forms.get(match[0], ""), "")), text)


def _remember(memory: dict[str, str] | dict[str, None], value: str, variable: str | None) -> None:
    _cache.clear()
    memory.pop(value, None)
    memory[value] = variable  # type: ignore[assignment]  # values of one type per dict
    while len(memory) > _MAX_ENTRIES:
        del memory[next(iter(memory))]


def _can_be_found(value: str) -> bool:
    if value.lower() in _COMMON:
        return False
    return len(value) >= (_MIN_WORD_LENGTH if value.isalpha() else _MIN_LENGTH) and len(set(value)) > 2


def _looks_random(value: str) -> bool:
    if "://" in value or value.startswith(("/", "./", "../", "~")):
        return False
    has_digit, has_letter = any(map(str.isdigit, value)), any(map(str.isalpha, value))
    return has_letter and (has_digit or len(value) >= _LONG_PLACEHOLDER_LENGTH)


@functools.lru_cache(maxsize=1024)
def _is_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111 -- the value may not be a path
    except ValueError:
        return False


@functools.lru_cache(maxsize=16)
def _pattern(values: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern that matches all forms of the values, and the value of each form."""
    forms: dict[str, str] = {}
    for value in values:
        for form in _forms(value):
            forms.setdefault(form, value)
    written = []
    for form in sorted(forms, key=len, reverse=True):
        escaped = re.escape(form)
        written.append(escaped if len(form) >= _LONG_LENGTH else rf"(?<![A-Za-z0-9]){escaped}(?![A-Za-z0-9])")
    # Messages truncate long values, so parts of a secret must be masked as well.
    written += [
        rf"{re.escape(form[:_MIN_PREFIX_LENGTH])}\S{{0,{len(form)}}}(?=\.\.\.)"
        for form in forms
        if len(form) >= _LONG_LENGTH
    ]
    return re.compile("|".join(written)), forms


def _forms(value: str) -> set[str]:
    lines = {line.strip() for line in value.splitlines()} if "\n" in value else set()
    texts = {value, *(line for line in lines if len(line) >= _MIN_LINE_LENGTH)}
    forms = set()
    for text in texts:
        forms |= {
            text,
            quote(text, errors="replace"),
            quote(text, safe="", errors="replace"),
            quote_plus(text, errors="replace"),
            json.dumps(text)[1:-1],
            json.dumps(text, ensure_ascii=False)[1:-1],
            repr(text)[1:-1],
        }
    return forms
