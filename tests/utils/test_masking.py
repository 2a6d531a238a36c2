"""Secrets are masked in logs."""

from __future__ import annotations

from typing import Any

import pytest

from stratagem.utils import mask_secrets, mask_text

SECRET_NAMES = (
    "token WANDB_API_KEY clientSecret password aws_credentials passphrase hf-token db_password password2 apiKey api_keys "
    "access_token HFToken AWS_SECRET_ACCESS_KEY aws_access_key_id PGPASSWORD smtp_pass auth basic_auth private_key secrets dsn "
    "connection_string user_token password_prod Authorization session.cookie secret_value login.password passwd"
)
OTHER_NAMES = (
    "custom_keys tokenizer pad_token_id num_key_value_heads key_padding monkey passes tokens_per_batch key keys key_dim "
    "max_tokens token_dim mask_token pad_token cls_token eos_token bos_token num_tokens image_token author authors secretary "
    "tokens passing bypass signature_dim keyword state_dict_key metric_key sort_key monitor_key token_type token_ids compass "
    "forward_pass password_file secret_name PWD OLDPWD GPG_KEY kv_key cookiecutter passthrough signature authoring"
)


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_values_of_secret_names_are_masked(name: str) -> None:
    """A value whose key names a secret is masked."""
    assert mask_secrets({name: "hunter2"}) == {name: "***"}


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_values_of_similar_names_are_kept(name: str) -> None:
    """Names are matched by whole words, and words with a different meaning in models are not secret."""
    assert mask_secrets({name: "layers"}) == {name: "layers"}
    assert mask_text(f"{name}='layers'") == f"{name}='layers'"


def test_an_object_under_an_ambiguous_name_is_kept() -> None:
    """A mapping with a ``type`` describes an object to build, such as a token embedding, and is not masked."""
    given = {"token": {"type": "Embedding", "mode": "mean", "password": "hunter2"}}
    assert mask_secrets(given) == {"token": {"type": "Embedding", "mode": "mean", "password": "***"}}


def test_everything_under_a_secret_name_is_masked() -> None:
    """Strings and numbers below a key that names a secret are masked at any depth."""
    given = {"login": {"credentials": {"user": "me", "pins": [1234, "x"]}}, "lr": 0.1}
    assert mask_secrets(given) == {"login": {"credentials": {"user": "***", "pins": ["***", "***"]}}, "lr": 0.1}


def test_other_values_are_kept() -> None:
    """Values that are not secret are unchanged, and so are flags whose keys name a secret."""
    given: dict[str, Any] = {"lr": 0.1, "sizes": (1, 2), "use_token": True, "token": None, "name": "resnet"}
    assert mask_secrets(given) == given


def test_the_argument_is_not_modified() -> None:
    """Masking returns a copy and does not modify its argument."""
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
        ("https://me:p/w@host/x", "https://***@host/x"),
        ("https://host:80/x@y", "https://host:80/x@y"),
        (
            "https://host/x?X-Amz-Credential=a%2Fb&X-Amz-Date=1&sig=c",
            "https://host/x?X-Amz-Credential=***&X-Amz-Date=1&sig=***",
        ),
        ("https://h/?AWSAccessKeyId=a&Signature=b&Expires=3", "https://h/?AWSAccessKeyId=***&Signature=***&Expires=3"),
        ("to=https%3A%2F%2Fh%2F%3Fsig%3Dabc%26x%3D1", "to=https%3A%2F%2Fh%2F%3Fsig%3D***%26x%3D1"),
        ('{"url": "https://a:b@c/?token=d"}', '{"url": "https://***@c/?token=***"}'),
        ("x='https://{{ $SECRET:x }}@h/?sig={{ $SECRET:x }}'", "x='https://{{ $SECRET:x }}@h/?sig={{ $SECRET:x }}'"),
        ("https://h/x?page=2&num_tokens=5", "https://h/x?page=2&num_tokens=5"),
        ("mail me@host, https://host/user@x", "mail me@host, https://host/user@x"),
    ],
)
def test_secrets_in_urls_are_masked(text: str, masked: str) -> None:
    """User information and secret query values of URLs are masked anywhere in a string."""
    assert mask_text(text) == masked
    assert mask_secrets({"note": [text]}) == {"note": [masked]}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("login with password=hunter2 failed", "login with password=*** failed"),
        ("{'api_key': 'abc', \"n\": 1}", "{'api_key': '***', \"n\": 1}"),
        ('{\\"client_secret\\": \\"abc\\"}', '{\\"client_secret\\": \\"***\\"}'),
        ("train --set vars.token=abc --set lr=1", "train --set vars.token=*** --set lr=1"),
        ("Authorization: Bearer abc123def456", "Authorization: Bearer ***"),
        ("Authorization: Basic dXNlcjpwdw==", "Authorization: Basic ***"),
        ("the token hf_0123456789abcdefghijABCD", "the token ***"),
        ("{'password': 'abcdef...", "{'password': '***..."),
        ("token: 3 of 5, auth: failed, password=None", "token: 3 of 5, auth: failed, password=None"),
    ],
)
def test_assigned_secrets_in_messages_are_masked(text: str, masked: str) -> None:
    """Values that are assigned to names of secrets are masked anywhere in a string."""
    assert mask_text(text) == masked


def test_secret_environment_variables_are_masked_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of a secret environment variable is masked in all of its escaped forms."""
    monkeypatch.setenv("SOME_SERVICE_TOKEN", 'a"b/c+9 é')
    for form in (
        'a"b/c+9 é',
        "a%22b%2Fc%2B9%20%C3%A9",
        "a%22b/c%2B9%20%C3%A9",
        "a%22b%2Fc%2B9+%C3%A9",
        r"a\"b/c+9 \u00e9",
    ):
        assert mask_text(f"GET <{form}>") == "GET <***>"


def test_a_truncated_secret_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated secret followed by an ellipsis is masked."""
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "0123456789abcdefghij")
    assert mask_text("got 'https://x/0123456789abc...' instead") == "got 'https://x/***...' instead"


@pytest.mark.parametrize("value", ["1", "abc", "training", "password", str(__file__)])
def test_common_values_are_not_masked_by_value(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Short values, common words and file paths are not masked by value, because logs would become unreadable."""
    monkeypatch.setenv("SOME_SERVICE_TOKEN", value)
    assert mask_text(f"see {value} there") == f"see {value} there"


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part",
    [
        "a",
        "://",
        "https://",
        "://x:y",
        "@",
        "?",
        "&a",
        "?sig=",
        "x%3D",
        "password=",
        "password='",
        "bearer ",
        "sk-a",
        "eyJ-",
    ],
)
def test_masking_takes_linear_time(part: str) -> None:
    """Masking 300,000 characters that resemble the start of a secret takes linear time."""
    text = part * (300_000 // len(part))
    assert len(mask_text(text)) > 0
    assert len(mask_text(f"https://{text}@host")) > 0
