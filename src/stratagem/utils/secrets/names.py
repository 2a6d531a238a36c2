"""Recognize the names of secrets, such as ``password`` and ``api_key``."""

from __future__ import annotations

import functools
import re

__all__ = ["is_secret_name", "is_secret_parameter", "is_special_token", "is_strongly_secret_name"]


def _words_in(words: str) -> frozenset[str]:
    return frozenset(words.split())


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# A name that contains one of these words refers to a secret, unless its last word is in _ABOUT_A_SECRET.
_STRONG = _words_in(
    "password passwords passwd passphrase passphrases passcode secret secrets credential credentials creds apikey apikeys "
    "accesskey secretkey privatekey authtoken accesstoken apitoken bearertoken clientsecret sshpass"
)
_STRONG_ENDINGS = ("password", "passwd", "passphrase")
_ABOUT_A_SECRET = _words_in(
    "file files path paths dir directory folder url name names length len dim size type kind manager policy field env var "
    "variable provider store helper min max count num rules regex pattern required enabled"
)
# A name refers to a secret if its last word is one of these.
_LAST = _words_in("token auth authorization cookie cookies bearer dsn jwt pw")
_PAIRS = frozenset(
    f"{first} {last}"
    for last, firsts in {
        "key": "api access secret private account auth encryption signing master storage shared subscription consumer license "
        "deploy webhook",
        "keys": "api access secret private account auth encryption signing",
        "tokens": "api access auth bearer refresh secret security hf github gitlab",
        "pass": "db smtp user admin root login ssh mysql redis ftp mail http proxy email database",
        "pwd": "db smtp user admin root login ssh mysql redis ftp mail http proxy email database",
        "string": "connection",
        "uid": "secret",
    }.items()
    for first in firsts.split()
)
_TRIPLES = frozenset({"access key id", "secret access key"})
# Words that can follow the name of a secret.
_TRAILING = _words_in("value string str text plain b64 base64 hex encoded header old new raw prod dev test")
# After one of these words, "token" refers to a token that a model processes, not to a secret.
_TOKENS_OF_A_MODEL = _words_in(
    "pad eos bos mask masked cls sep unk oov num max min special start end stop begin image img video audio speech text prompt "
    "class register query key value first last next prev previous current per add new extra target source src tgt input "
    "output decoder encoder eot sot eod eom bom boi eoi fim prefix suffix middle blank space newline separator delimiter word "
    "sub byte char vocab dummy null empty learnable learned dist distill distillation global local pool pooling memory patch "
    "pos position positional content placeholder assistant system tool turn language lang task timestamp latent noise visual "
    "vision state action time cond condition id ids"
)


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether a string under this name is a secret.

    The name is split into words (``snake_case``, ``camelCase``, ``kebab-case``, dots and digits), and only whole words are
    compared: ``password``, ``api_key`` and ``clientSecret`` are names of secrets; ``tokenizer``, ``pad_token``,
    ``key_padding`` and ``bypass`` are not.
    """
    words = _words(name)
    if not words or words[-1] in _ABOUT_A_SECRET:
        return False
    if _has_strong_word(words) or words == ["pass"]:
        return True
    if " ".join(words[-2:]) in _PAIRS:
        return True
    while len(words) > 1 and words[-1] in _TRAILING:
        words = words[:-1]
    if " ".join(words[-2:]) in _PAIRS or " ".join(words[-3:]) in _TRIPLES:
        return True
    if words[-1] == "token" and len(words) > 1 and words[-2] in _TOKENS_OF_A_MODEL:
        return False
    return words[-1] in _LAST


@functools.lru_cache(maxsize=4096)
def is_strongly_secret_name(name: str) -> bool:
    """Return whether all values under this name are secret, as under ``credentials``."""
    words = _words(name)
    return bool(words) and words[-1] not in _ABOUT_A_SECRET and _has_strong_word(words)


_PARAMETER_WORDS = _words_in(
    "sig signature hmac key apikey token secret password passwd passphrase pass pwd pw auth authorization credential "
    "credentials jwt policy ticket session sessionid sas"
)
_PARAMETERS = frozenset({"awsaccesskeyid", "googleaccessid", "key-pair-id", "code", "access_token", "id_token"})


@functools.lru_cache(maxsize=4096)
def is_secret_parameter(name: str) -> bool:
    """Return whether a query parameter of a URL with this name is a secret or a signature.

    More names match than with :func:`is_secret_name`, such as ``?key=...`` and ``?sig=...``, since URLs can be signed.
    """
    if name.lower() in _PARAMETERS or is_secret_name(name):
        return True
    words = _words(name)
    return bool(words) and words[-1] in _PARAMETER_WORDS


_SPECIAL_TOKEN = re.compile(r"<[^<>\s]{0,40}>|\[[A-Z0-9_]{1,40}\]")


def is_special_token(value: str) -> bool:
    """Return whether a string is a special token of a tokenizer, such as ``<pad>`` or ``[CLS]``, which is not a secret."""
    return _SPECIAL_TOKEN.fullmatch(value) is not None


def _words(name: str) -> list[str]:
    """Return the lowercase words of the last part of a dotted name, without trailing numbers."""
    words = [word.lower() for word in _WORD.findall(name.rpartition(".")[2] or name)]
    while words and words[-1].isdigit():
        words.pop()
    return words


def _has_strong_word(words: list[str]) -> bool:
    return any(word in _STRONG or word.endswith(_STRONG_ENDINGS) for word in words)
