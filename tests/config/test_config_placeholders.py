import pytest

from stratagem.config import Config
from stratagem.errors import ConfigKeyError, ConfigValueError

FILE_KEYS = {"py": "x = '{}'", "yaml": "x: {}", "json": '{{"x": "{}"}}', "toml": "x = '{}'"}


@pytest.mark.parametrize("suffix", FILE_KEYS)
def test_a_file_can_refer_to_its_own_name(tmp_path, suffix):
    """Placeholders expand to the folder, name, stem and suffix of the configuration file."""
    path = tmp_path / f"run.{suffix}"
    names = "{{ fileDirname }}|{{fileBasename}}|{{ fileBasenameNoExtension }}|{{ fileExtname }}"
    path.write_text(FILE_KEYS[suffix].format(names))
    assert Config.fromfile(path)["x"] == f"{tmp_path.as_posix()}|run.{suffix}|run|.{suffix}"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("py", "lr = {{ $LR:0.1 }}\nname = '{{ $LR:0.1 }}'\nboth = f'a{{$LR:0.1}}{1 + 1}'\n"),
        ("yaml", "lr: {{ $LR:0.1 }}\nname: '{{ $LR:0.1 }}'\nboth: a{{$LR:0.1}}2\n"),
        ("json", '{"lr": {{ $LR:0.1 }}, "name": "{{ $LR:0.1 }}", "both": "a{{$LR:0.1}}2"}'),
        ("toml", "lr = {{ $LR:0.1 }}\nname = '{{ $LR:0.1 }}'\nboth = \"a{{$LR:0.1}}2\"\n"),
    ],
)
def test_environment_variables_with_defaults(monkeypatch, suffix, text):
    """A variable outside quotes is parsed as a number if possible, and all variables that are read are listed."""
    monkeypatch.delenv("LR", raising=False)
    config = Config.fromstring(text, f".{suffix}")
    assert config == {"lr": 0.1, "name": "0.1", "both": "a0.12"}
    monkeypatch.setenv("LR", "3")
    config = Config.fromstring(text, f".{suffix}")
    assert config == {"lr": 3, "name": "3", "both": "a32"}
    assert config.env_variables == {"LR": "3"}


@pytest.mark.parametrize("value", ["it's", 'say "hi"', "back\\slash", "$(x) \\1 {{y}}", "a: b # c", "', evil='"])
@pytest.mark.parametrize("suffix", ["py", "yaml", "json", "toml"])
def test_special_characters_in_a_variable_are_preserved(monkeypatch, suffix, value):
    """Quotes, backslashes and other special characters in a variable are preserved in every language."""
    monkeypatch.setenv("ODD", value)
    assert Config.fromstring(FILE_KEYS[suffix].format("<{{ $ODD:x }}>"), f".{suffix}") == {"x": f"<{value}>"}


def test_a_placeholder_may_contain_quotes(monkeypatch):
    """``{{'$NAME:1'}}`` is equivalent to ``{{ $NAME:1 }}``."""
    monkeypatch.delenv("NAME", raising=False)
    assert Config.fromstring("x = {{'$NAME:1'}}", ".py") == {"x": 1}
    assert Config.fromstring("x = {{ '$NAME: a b ' }}", ".py") == {"x": "a b"}
    monkeypatch.setenv("NAME", "2")
    assert Config.fromstring("x = {{'$NAME'}}", ".py") == {"x": 2}


def test_an_unset_variable_is_a_key_error_with_its_line(monkeypatch):
    """A variable that is required, unset and without a default raises an error with file and line."""
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(KeyError, match=r"<string>:2: the environment variable NOT_SET_HERE is not set"):
        Config.fromstring("a: 1\nb: {{ $NOT_SET_HERE }}\n", ".yaml")
    assert Config.fromstring("a: 1\n# {{ $NOT_SET_HERE }}\n", ".yaml") == {"a": 1}


BASE = "model = dict(type='Net', depth=3, stages=[dict(width=8)])\nlr = 0.1\n"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("py", "_base_ = 'base.py'\nhead = {{ _base_.model }}\nd = {{_base_.model.depth}}\nn = 'n{{ _base_.lr }}'\n"),
        ("py", "_base_ = 'base.py'\nhead = _base_.model\nd = _base_.model.depth\nn = f'n{_base_.lr}'\n"),
    ],
)
def test_a_python_file_reads_values_of_its_base(tmp_path, suffix, text):
    """``{{ _base_.a.b }}`` and ``_base_.a.b`` return the base's values with their types."""
    (tmp_path / "base.py").write_text(BASE)
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    config = Config.fromfile(path)
    assert config.head == config.model == {"type": "Net", "depth": 3, "stages": [{"width": 8}]}
    assert config.d == 3
    assert config.n == "n0.1"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (
            "yaml",
            "_base_: base.yaml\nhead: {{ _base_.model }}\nw: '{{ _base_.model.stages.0.width }}'\nn: n{{_base_.lr}}\n",
        ),
        (
            "json",
            """{"_base_": "base.yaml", "head": {{ _base_.model }},
                "w": {{_base_.model.stages.0.width}}, "n": "n{{ _base_.lr }}"}""",
        ),
        (
            "toml",
            "_base_='base.yaml'\nhead={{ _base_.model }}\nw='{{_base_.model.stages.0.width}}'\nn='n{{_base_.lr}}'",
        ),
    ],
)
def test_a_data_file_reads_values_of_its_base(tmp_path, suffix, text):
    """A string that consists only of a placeholder becomes the base's value, quoted or not."""
    (tmp_path / "base.yaml").write_text("model: {depth: 3, stages: [{width: 8}]}\nlr: 0.1\n")
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    config = Config.fromfile(path)
    assert config.head == {"depth": 3, "stages": [{"width": 8}]}
    assert config.w == 8
    assert config.n == "n0.1"


def test_a_missing_value_of_the_base_suggests_the_closest_key(tmp_path):
    """Reading a missing key of the base suggests the closest one."""
    (tmp_path / "base.yaml").write_text("model: {depth: 3}\n")
    (tmp_path / "run.yaml").write_text("_base_: base.yaml\nx: '{{ _base_.model.dept }}'\n")
    with pytest.raises(ConfigKeyError, match="Did you mean 'depth'"):
        Config.fromfile(tmp_path / "run.yaml")


def test_other_braces_are_unchanged():
    """Braces of other template languages are unchanged."""
    assert Config.fromstring("x = '{{ name }} {{% if %}}'", ".py") == {"x": "{{ name }} {{% if %}}"}


IN_URLS = {
    "yaml": ("yaml", "load_from: 'https://host/x?k={{ $KEEP_IT }}'"),
    "yaml without quotes": ("yaml", "load_from: https://host/x?k={{ $KEEP_IT }}"),
    "json": ("json", '{"load_from": "https://host/x?k={{ $KEEP_IT }}"}'),
    "escaped": ("json", r'{"load_from": "https:\/\/host/x?k={{ $KEEP_IT }}"}'),
    "toml": ("toml", "load_from = 'https://host/x?k={{ $KEEP_IT }}'"),
    "another scheme": ("yaml", "load_from: 'hf://organization/{{ $KEEP_IT }}'"),
    "scheme of a placeholder": ("yaml", "load_from: '{{ $NO_SUCH_NAME:https }}://host/{{ $KEEP_IT }}'"),
    "separator in a placeholder": ("yaml", "load_from: '{{ $NO_SUCH_NAME:https:// }}host/{{ $KEEP_IT }}'"),
    "blanks that URLs lose": ("yaml", 'load_from: "https:/\\t/host/{{ $KEEP_IT }}"'),
    "deep": ("yaml", "a: [{load_from: 'https://host/{{ $KEEP_IT }}'}]"),
    "default": ("yaml", "load_from: 'https://{{ $NO_SUCH_NAME:host }}/x'"),
    "base": ("yaml", "_base_: base.yaml\nload_from: 'https://host/{{ _base_.text }}'"),
    "number of a base": ("yaml", "_base_: base.yaml\nload_from: 'https://host/{{ _base_.number }}'"),
    "mapping of a base": ("yaml", "_base_: base.yaml\nload_from: 'https://host/{{ _base_.deep }}'"),
    "URL of a base": ("yaml", "_base_: base.yaml\nload_from: '{{ _base_.url }}{{ _base_.text }}'"),
    "key": ("yaml", "{'https://host/{{ $KEEP_IT }}': 1}"),
}


@pytest.mark.parametrize(("suffix", "text"), IN_URLS.values(), ids=IN_URLS)
def test_a_data_file_cannot_insert_an_environment_variable_into_a_url(tmp_path, monkeypatch, suffix, text):
    """A data file must not insert an environment variable into a URL, since it would be sent to the host."""
    monkeypatch.setenv("KEEP_IT", "s3cr3tvalue")
    monkeypatch.setenv("KEEP_NUMBER", "73310042")
    base = "text: '{{ $KEEP_IT }}'\nnumber: {{ $KEEP_NUMBER }}\ndeep: {a: ['{{ $KEEP_IT }}']}\nurl: 'https://host/'\n"
    (tmp_path / "base.yaml").write_text(base)
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    with pytest.raises(ConfigValueError, match=r"run\.\w+:\d: .* into a URL") as error_message:
        Config.fromfile(path)
    assert "s3cr3t" not in str(error_message.value)
    assert "7331" not in str(error_message.value)


def test_other_placeholders_of_a_data_file_are_allowed_in_urls(tmp_path, monkeypatch):
    """The file name, values of the base and a complete URL from a variable are allowed in URLs."""
    monkeypatch.setenv("MIRROR", "https://mirror/weights.pth")
    (tmp_path / "base.yaml").write_text("name: resnet\n")
    (tmp_path / "run.yaml").write_text(
        "_base_: base.yaml\na: 'https://host/{{ fileBasename }}'\nb: 'https://host/{{ _base_.name }}'\nc: '{{ $MIRROR }}'\n"
    )
    config = Config.fromfile(tmp_path / "run.yaml")
    assert (config.a, config.b, config.c) == (
        "https://host/run.yaml",
        "https://host/resnet",
        "https://mirror/weights.pth",
    )


def test_a_python_file_may_insert_an_environment_variable_into_a_url(monkeypatch):
    """A Python file is trusted, so it may insert an environment variable into a URL."""
    monkeypatch.setenv("KEEP_IT", "s3cr3tvalue")
    config = Config.fromstring("load_from = 'https://host/x?k={{ $KEEP_IT }}'", ".py")
    assert config.load_from == "https://host/x?k=s3cr3tvalue"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [("py", "a = 1\nlr = {{ $LR }}\n"), ("yaml", "a: 1\nlr: {{ $LR }}\n"), ("toml", "a = 1\nlr = {{ $LR }}\n")],
)
def test_values_next_to_a_placeholder_have_lines(monkeypatch, suffix, text):
    """A placeholder outside quotes does not affect the line numbers of the file."""
    monkeypatch.setenv("LR", "0.5")
    config = Config.fromstring(text, f".{suffix}")
    assert [str(config.where(key)) for key in ("a", "lr")] == ["<string>:1", "<string>:2"]


def test_a_placeholder_in_a_comment_is_ignored(tmp_path):
    """A placeholder in a comment of a Python file is not expanded."""
    (tmp_path / "run.py").write_text("lr = 1\n# policies={{_base_.policies}}\n")
    assert Config.fromfile(tmp_path / "run.py") == {"lr": 1}
