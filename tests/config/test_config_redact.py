"""Saved configurations contain placeholders instead of their values, and no secrets."""

import copy
import pickle

import pytest

from stratagem.config import Config, changed_values, check, explain, show
from stratagem.errors import ConfigValueError
from stratagem.registry import MODELS

SUFFIXES = (".py", ".yaml", ".json", ".toml")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "text",
    [
        "a = '{{ $WORD }}'", "a = 'x-{{ $WORD }}-{{ $OTHER:7 }}'", "a = 'x' + '{{ $WORD }}'",
        "b = ['{{ $WORD }}']\na = b[0]", "a = '{{ $WORD:default }}'",
        "a = 'long ' * 30 + '{{ $WORD }} ' * 30 + '\\n x'", "w = '{{ $WORD }}'\na = f'{w}!'", "a = dict(b='{{ $WORD }}')['b']",
    ],
)  # fmt: skip
def test_strings_from_the_environment_are_saved_as_placeholders(monkeypatch, suffix, text):
    """A string read from a placeholder is saved as that placeholder in every language and loads with the same value."""
    monkeypatch.setenv("WORD", "w0rd-of-the-environment")
    config = Config.fromstring(text, ".py")
    kept = show(config, suffix)
    assert "w0rd" not in kept
    assert "{{ $WORD" in kept
    assert Config.fromstring(kept, suffix) == config


def test_built_objects_receive_plain_strings(monkeypatch):
    """An object is built with a plain string, even if the value came from a placeholder."""
    monkeypatch.setenv("MODE", "nearest")
    config = Config.fromstring("model = dict(type='torch.nn.Upsample', scale_factor=2, mode='{{ $MODE }}')", ".py")
    assert type(MODELS.build(config.model).mode) is str


def test_values_that_are_not_strings_are_saved_as_values(monkeypatch):
    """Numbers and flags from placeholders are saved as values, so that a change is detected."""
    monkeypatch.setenv("RATE", "0.25")
    assert show(Config.fromstring("lr = {{ $RATE }}\nfast = {{ $FAST:true }}", ".py")) == "lr = 0.25\nfast = True\n"


def test_a_default_under_a_secret_name_is_masked(monkeypatch):
    """The default of a placeholder is masked if the key names a secret, and omitted if the variable is set."""
    monkeypatch.delenv("SOME_VALUE", raising=False)
    text = "password = '{{ $SOME_VALUE:hunter2 }}'"
    assert show(Config.fromstring(text, ".py")) == "password = '{{ $SECRET:password }}'\n"
    monkeypatch.setenv("SOME_VALUE", "hunter3")
    assert show(Config.fromstring(text, ".py")) == "password = '{{ $SOME_VALUE }}'\n"


SECRETS = {
    "password": ("hunter2", "{{ $SECRET:password }}"),
    "api_keys": (["abc1", "abc2"], ["{{ $SECRET:api_keys.0 }}", "{{ $SECRET:api_keys.1 }}"]),
    "auth": (("me", "pw1234"), ("{{ $SECRET:auth.0 }}", "{{ $SECRET:auth.1 }}")),
    "secret": (b"abc123", "{{ $SECRET:secret }}"),
    "credentials": (
        {"type": "Static", "user": "me", "pins": [1, "x"]},
        {"type": "Static", "user": "{{ $SECRET:credentials.user }}", "pins": [1, "{{ $SECRET:credentials.pins.1 }}"]},
    ),
    "url": ("https://me:pw@host/x", "https://{{ $SECRET:url }}@host/x"),
    "mirror": (["s3://h/x?sig=abc&n=1"], ["s3://h/x?sig={{ $SECRET:mirror.0 }}&n=1"]),
    "token": ({"type": "Embedding", "mode": "mean"}, {"type": "Embedding", "mode": "mean"}),
    "note": ("use hf_0123456789abcdefghijABCD", "use {{ $SECRET:note }}"),
    "command": (
        "curl -H 'Authorization: Bearer abc123def456'",
        "curl -H 'Authorization: Bearer {{ $SECRET:command }}'",
    ),
    "tokenizer": ("bert", "bert"),
    "pad_token": ("<pad>", "<pad>"),
    "my_token": ("<eos>", "<eos>"),
    "load_from": ("https://host/x.pth#sha256=0123abcd", "https://host/x.pth#sha256=0123abcd"),
    "hub": ("hf://organization/name@main/file", "hf://organization/name@main/file"),
    "empty_password": ("", ""),
    "no_token": (None, None),
    "retry_auth": (3, 3),
}


@pytest.mark.parametrize("key", SECRETS)
def test_secrets_are_saved_as_placeholders(key):
    """Strings whose keys name secrets, and secrets in URLs, are masked; all other values are unchanged."""
    value, kept = SECRETS[key]
    config = Config({key: value})
    assert show(config) == show(Config({key: kept})) == config.dump() == config.pretty_text
    assert config[key] == value


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_masked_secret_loads_and_fails_when_used(suffix):
    """A saved configuration loads, prints and copies; reading a masked value raises an error with its key and the fix."""
    kept = show(Config({"model": {"type": "X", "password": "hunter2"}, "url": "https://me:pw@host", "lr": 0.1}), suffix)
    config = Config.fromstring(kept, suffix)
    assert config.lr == 0.1
    assert config.model.type == "X"
    assert show(config, suffix) == kept
    for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config)), Config(config)):
        with pytest.raises(
            ConfigValueError, match=r"<string>:\d+: the secret model.password was masked .*--set model.password="
        ):
            same.model["password"]
        with pytest.raises(ConfigValueError, match="the secret url was masked"):
            same["url"]
        with pytest.raises(ConfigValueError, match="the secret model.password was masked"):
            MODELS.build(same.model)
        with pytest.raises(ConfigValueError, match="the secret model.password was masked"):
            dict(**same.model)


def test_a_masked_secret_in_a_list_fails_when_used():
    """A masked item of a list cannot be used as a string."""
    config = Config.fromstring("api_keys = ['{{ $SECRET:api_keys.0 }}']", ".py")
    for use in (str, "{}".format, lambda item: item.upper()):
        with pytest.raises(ConfigValueError, match="the secret api_keys.0 was masked"):
            use(config.api_keys[0])


def test_a_masked_secret_can_be_overridden():
    """An override replaces a masked secret."""
    config = Config.fromstring("password = '{{ $SECRET:password }}'", ".py")
    config.merge_from_dict({"password": "hunter2"})
    assert config.password == "hunter2"


def test_a_variable_named_secret_is_an_ordinary_variable(monkeypatch):
    """Without a key, `{{ $SECRET }}` reads the environment variable SECRET."""
    monkeypatch.setenv("SECRET", "hunter22")
    assert Config.fromstring("a: '{{ $SECRET }}'", ".yaml").a == "hunter22"


def test_explain_shows_no_secrets(monkeypatch):
    """Explain shows each change in masked form, even if a parent key names a secret."""
    monkeypatch.setenv("WORD", "w0rd-of-the-environment")
    config = Config.fromstring("credentials = dict(value='hunter2', more=dict(a='hunter3'))\na = '{{ $WORD }}'", ".py")
    config.merge_from_dict({"credentials.value": "hunter4"})
    shown = "\n".join(explain(config, path) for path in ("credentials", "credentials.value", "credentials.more.a", "a"))
    assert "hunter" not in shown
    assert "w0rd" not in shown
    assert "{{ $WORD }}" in shown
    assert "replaced  '{{ $SECRET:credentials.value }}'" in shown


def test_a_repr_shows_no_secrets():
    """The repr of a configuration shows no secrets."""
    assert "hunter2" not in repr(Config({"a": {"password": "hunter2"}}))


def test_changes_of_secrets_are_not_reported():
    """Changed secrets are not reported, even if an earlier version saved them; a placeholder hides the other value."""
    old = "a = dict(password='old1', url='https://me:pw@h/1', word='w0rd', lr=1)\n"
    new = show(Config({"a": {"password": "new1", "url": "https://you:pw2@h/1", "lr": 2}})) + ""
    new = new.replace("lr=2", "word='{{ $WORD }}', lr=2")
    assert changed_values(old, new) == ["a.word: (hidden) -> '{{ $WORD }}'", "a.lr: 1 -> 2"]


def test_check_reports_masked_secrets_before_anything_is_built():
    """A masked secret in a section that needs it is a problem of the configuration, with its path."""
    config = Config.fromstring(
        "load_from = 'https://{{ $SECRET:load_from }}@h'\nvars = dict(password='{{ $SECRET:p }}')", ".py"
    )
    problems = check(config, {"load_from": lambda _: pytest.fail("was read")})
    assert [problem.path for problem in problems] == ["load_from"]
