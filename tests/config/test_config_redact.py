"""What is kept of a configuration has placeholders for placeholders, and no secrets."""

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
def test_strings_of_the_environment_are_kept_as_placeholders(monkeypatch, suffix, text):
    """What a placeholder filled is written as the placeholder in every language, and reads as the same again."""
    monkeypatch.setenv("WORD", "w0rd-of-the-environment")
    config = Config.fromstring(text, ".py")
    kept = show(config, suffix)
    assert "w0rd" not in kept
    assert "{{ $WORD" in kept
    assert Config.fromstring(kept, suffix) == config


def test_what_is_built_gets_plain_strings(monkeypatch):
    """A string that a placeholder filled is an ordinary one for what is built from it."""
    monkeypatch.setenv("MODE", "nearest")
    config = Config.fromstring("model = dict(type='torch.nn.Upsample', scale_factor=2, mode='{{ $MODE }}')", ".py")
    assert type(MODELS.build(config.model).mode) is str


def test_values_that_are_not_strings_stay_values(monkeypatch):
    """Numbers and flags that a placeholder gave are kept as they were used, so that a changed one is noticed."""
    monkeypatch.setenv("RATE", "0.25")
    assert show(Config.fromstring("lr = {{ $RATE }}\nfast = {{ $FAST:true }}", ".py")) == "lr = 0.25\nfast = True\n"


def test_a_default_under_the_name_of_a_secret_is_masked(monkeypatch):
    """A default is a literal of the file: under the name of a secret it is one, and with the variable set it is left out."""
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
def test_secrets_are_kept_as_markers(key):
    """Strings under the names of secrets and the secrets in URLs are masked, and nothing else is."""
    value, kept = SECRETS[key]
    config = Config({key: value})
    assert show(config) == show(Config({key: kept})) == config.dump() == config.pretty_text
    assert config[key] == value


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_masked_secret_loads_and_fails_at_use(suffix):
    """A kept configuration loads, shows and copies; reading a masked value names its key and how to give it."""
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


def test_a_masked_secret_of_a_list_fails_at_use():
    """An item of a list is not looked up by a key, and still is not taken for a string."""
    config = Config.fromstring("api_keys = ['{{ $SECRET:api_keys.0 }}']", ".py")
    for use in (str, "{}".format, lambda item: item.upper()):
        with pytest.raises(ConfigValueError, match="the secret api_keys.0 was masked"):
            use(config.api_keys[0])


def test_a_masked_secret_can_be_given_again():
    """An override takes the place of a masked secret."""
    config = Config.fromstring("password = '{{ $SECRET:password }}'", ".py")
    config.merge_from_dict({"password": "hunter2"})
    assert config.password == "hunter2"


def test_a_variable_named_secret_is_still_a_variable(monkeypatch):
    """Without a key, `{{ $SECRET }}` reads the variable of that name."""
    monkeypatch.setenv("SECRET", "hunter22")
    assert Config.fromstring("a: '{{ $SECRET }}'", ".yaml").a == "hunter22"


def test_explain_shows_no_secret(monkeypatch):
    """Each change of a value is shown as it would be kept, also where a key above names a secret."""
    monkeypatch.setenv("WORD", "w0rd-of-the-environment")
    config = Config.fromstring("credentials = dict(value='hunter2', more=dict(a='hunter3'))\na = '{{ $WORD }}'", ".py")
    config.merge_from_dict({"credentials.value": "hunter4"})
    shown = "\n".join(explain(config, path) for path in ("credentials", "credentials.value", "credentials.more.a", "a"))
    assert "hunter" not in shown
    assert "w0rd" not in shown
    assert "{{ $WORD }}" in shown
    assert "replaced it  '{{ $SECRET:credentials.value }}'" in shown


def test_a_repr_shows_no_secret():
    """A configuration that is printed shows no secret."""
    assert "hunter2" not in repr(Config({"a": {"password": "hunter2"}}))


def test_changes_of_secrets_are_not_reported():
    """A secret that was kept in clear by an earlier version, or changed, is no change; a placeholder hides the other value."""
    old = "a = dict(password='old1', url='https://me:pw@h/1', word='w0rd', lr=1)\n"
    new = show(Config({"a": {"password": "new1", "url": "https://you:pw2@h/1", "lr": 2}})) + ""
    new = new.replace("lr=2", "word='{{ $WORD }}', lr=2")
    assert changed_values(old, new) == ["a.word: (a value that is not shown) -> '{{ $WORD }}'", "a.lr: 1 -> 2"]


def test_check_names_masked_secrets_before_anything_is_built():
    """A masked secret that a section needs is a problem of the configuration, with its place."""
    config = Config.fromstring(
        "load_from = 'https://{{ $SECRET:load_from }}@h'\nvars = dict(password='{{ $SECRET:p }}')", ".py"
    )
    problems = check(config, {"load_from": lambda _: pytest.fail("was read")})
    assert [problem.path for problem in problems] == ["load_from"]
