"""Redact configurations before they are saved or displayed: restore placeholders and mask secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, final

from stratagem.config.keys import KeyPath
from stratagem.config.reading.placeholders import masked_marker
from stratagem.utils.data_names import template_of
from stratagem.utils.lazy import LazyObject, MaskedSecret
from stratagem.utils.secrets.masking import mask_text, mask_tokens, mask_urls
from stratagem.utils.secrets.names import is_secret_name, is_special_token, is_strongly_secret_name
from stratagem.utils.secrets.values import known_secrets, remember_secret, replace_known_secrets

__all__ = ["redacted", "remember_secrets"]

_PLACEHOLDER = re.compile(r"\{\{\s*+\$\s*+(?P<variable>\w++)[^{}]*+\}\}")
# Private-use Unicode characters that replace placeholders while the rest of a template is masked.
_STAND_IN = re.compile(r"[\U000F0000-\U000FFFFD]")
_FIRST_STAND_IN = 0xF0000
_MARKER = "{{ $SECRET:"
_UNCHANGED_TYPES = (bool, float, type(None), type, FunctionType, BuiltinFunctionType, LazyObject, MaskedSecret)


def redacted(value: Any, path: KeyPath = ()) -> Any:
    """Return a redacted copy of plain data, which is safe to save and display.

    Interpolated strings are replaced by their templates. Strings whose key is the name of a secret (see
    :mod:`stratagem.utils.secrets.names`), credentials and signatures in URLs, and other known secrets are replaced by
    ``{{ $SECRET:<path> }}``, which can be loaded but raises an error when it is used. Masked values are remembered, so that
    :func:`~stratagem.utils.mask_text` also masks them elsewhere.

    Args:
        value: The data: dicts, lists and tuples.
        path: The path of the data in the configuration.
    """
    # Collect secrets first, since a secret may also occur in a value before the key that identifies it.
    remember_secrets(value, path)
    return _Redactor(known_secrets()).value(value, path, _secrecy_at(path))


def remember_secrets(value: Any, path: KeyPath = ()) -> None:
    """Remember the secrets in this data, so that :func:`~stratagem.utils.mask_text` masks them from now on."""
    _Redactor({}).value(value, path, _secrecy_at(path))


def _secrecy_at(path: KeyPath) -> str:
    secrecy = ""
    for key in path:
        secrecy = _secrecy(key, secrecy)
    return secrecy


def _secrecy(key: object, inherited: str) -> str:
    """Return what to mask below a key: ``"all"`` values, ``"strings"`` if the name is ambiguous, or ``""`` for nothing."""
    if key == "type":
        return ""
    if isinstance(key, str) and is_strongly_secret_name(key):
        return "all"
    return inherited or ("strings" if isinstance(key, str) and is_secret_name(key) else "")


@final
@dataclass(frozen=True, slots=True)
class _Redactor:
    """Redacts nested data. ``known`` are secrets to replace wherever they occur."""

    known: Mapping[str, str]

    def value(self, value: Any, path: KeyPath, secrecy: str) -> Any:
        if isinstance(value, str):
            return self._text(value, path, secrecy)
        if isinstance(value, Mapping):
            # A mapping with a type describes an object, such as a token embedding.
            below = "" if secrecy == "strings" and "type" in value else secrecy
            return {
                self._text(key, path, "") if isinstance(key, str) else key: self.value(
                    item, (*path, key), _secrecy(key, below)
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            items = [self.value(item, (*path, index), secrecy) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, set | frozenset):
            return type(value)(self.value(item, path, secrecy) for item in value)
        return self._other(value, path, secrecy)

    def _other(self, value: Any, path: KeyPath, secrecy: str) -> Any:
        if isinstance(value, bytes):
            text = value.decode("latin-1")
            shown = self._text(text, path, secrecy)
            return value if shown == text else shown
        if isinstance(value, int) and not isinstance(value, bool):
            return self._masked(str(value), path) if str(value) in self.known else value
        if isinstance(value, _UNCHANGED_TYPES):
            return value
        # Other objects are written as str(value).
        text = str(value)
        masked = mask_text(text)
        return value if masked == text else masked

    def _text(self, value: str, path: KeyPath, secrecy: str) -> str:
        template = template_of(value)
        if secrecy and value and not (secrecy == "strings" and is_special_token(value)):
            return self._secret(str(value), path, str(value) if template is None else template)
        return self._masked(str(value) if template is None else template, path)

    def _secret(self, value: str, path: KeyPath, template: str) -> str:
        alone = _PLACEHOLDER.fullmatch(template)
        if alone is None or template != value:
            remember_secret(value)
        if alone is None:
            return masked_marker(path)
        if template.startswith(_MARKER):
            return template
        # Omit the default: under the name of a secret, it is also a secret.
        is_set = template == value or alone["variable"] in os.environ
        return f"{{{{ ${alone['variable']} }}}}" if is_set else masked_marker(path)

    def _masked(self, text: str, path: KeyPath) -> str:
        """Return ``text`` with its secrets masked and its placeholders unchanged."""
        placeholders: list[str] = []

        def stand_in(match: re.Match[str]) -> str:
            placeholders.append(match[0])
            return chr(_FIRST_STAND_IN + len(placeholders) - 1)

        text = _PLACEHOLDER.sub(stand_in, text)
        marker = masked_marker(path)
        masked = mask_urls(text, lambda part: _url_part(part, marker))
        # A data file must not put an environment variable into a URL.
        in_url = "://" in text
        masked = replace_known_secrets(
            masked, lambda name: f"{{{{ ${name} }}}}" if name in os.environ and not in_url else marker, self.known
        )
        # Do this last, since a known secret may be replaced by its variable.
        masked = mask_tokens(masked, marker)
        for index, placeholder in enumerate(placeholders):
            masked = masked.replace(chr(_FIRST_STAND_IN + index), placeholder)
        return masked


def _url_part(part: str, marker: str) -> str:
    """Return the replacement for credentials or a secret in a URL; unchanged if the secret is a placeholder."""
    secret = part.partition(":")[2] or part
    if _STAND_IN.fullmatch(secret):
        return part
    remember_secret(part)
    remember_secret(secret)
    return marker
