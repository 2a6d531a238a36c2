"""Secrets stay out of logs."""

from __future__ import annotations

from typing import Any

import pytest

from stratagem.utils import mask_secrets, mask_text


@pytest.mark.parametrize(
    "name", ["token", "WANDB_API_KEY", "clientSecret", "password", "aws_credentials", "passphrase", "hf-token"]
)
def test_values_of_secret_names_are_masked(name: str) -> None:
    """A value under a name like a secret's is never shown."""
    assert mask_secrets({name: "hunter2"}) == {name: "***"}


def test_everything_under_a_secret_name_is_masked() -> None:
    """Secrets are masked at any depth, as texts and as numbers."""
    given = {"login": {"credentials": {"user": "me", "pins": [1234, "x"]}}, "lr": 0.1}
    assert mask_secrets(given) == {"login": {"credentials": {"user": "***", "pins": ["***", "***"]}}, "lr": 0.1}


def test_other_values_are_kept() -> None:
    """What is no secret stays as it is, switches under secret names too."""
    given: dict[str, Any] = {"lr": 0.1, "sizes": (1, 2), "use_token": True, "token": None, "name": "resnet"}
    assert mask_secrets(given) == given


def test_the_argument_is_not_changed() -> None:
    """Masking works on a copy."""
    given = {"a": {"token": "t"}}
    mask_secrets(given)
    assert given == {"a": {"token": "t"}}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("s3+http://id@host:80", "s3+http://***@host:80"),
        ("see https://a:b@c/d and ftp://e:f@g", "see https://***@c/d and ftp://***@g"),
        ("https://u:p@ss@host/x", "https://***@host/x"),
        ("https://host/x?a=1&api_key=abc&b=2#top", "https://host/x?a=1&api_key=***&b=2#top"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("mail me@host, https://host/user@x", "mail me@host, https://host/user@x"),
    ],
)
def test_urls_lose_their_secrets(text: str, masked: str) -> None:
    """User information and secret query values of URLs are masked, wherever they stand in a text."""
    assert mask_text(text) == masked
    assert mask_secrets({"note": [text]}) == {"note": [masked]}
