import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratagem.config import Config, show
from stratagem.errors import ConfigFileError, ConfigValueError

NAMES = st.sampled_from(["a", "b1", "long_name_of_a_key", "type", "if", "Über"])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=20,
)
SECTIONS = st.dictionaries(st.sampled_from(["model", "lr", "stages", "work_dir"]), VALUES, max_size=4)


@pytest.mark.parametrize("suffix", ["py", "yaml", "json"])
@settings(max_examples=80, deadline=None)
@given(data=SECTIONS)
@pytest.mark.slow
def test_a_dump_loads_with_the_same_content(tmp_path_factory, suffix, data):
    """A dumped configuration loads with the same content."""
    path = tmp_path_factory.mktemp("dump") / f"run.{suffix}"
    Config(data).dump(path)
    assert Config.fromfile(path).to_dict() == data


def _without_none(value):
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value if item is not None]
    return value


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(data=SECTIONS)
def test_a_toml_dump_loads_with_the_same_content(tmp_path_factory, data):
    """A TOML dump loads with the same content, except None; integers and floats keep their types."""
    data = _without_none(data)
    path = tmp_path_factory.mktemp("dump") / "run.toml"
    Config(data).dump(path)
    assert Config.fromfile(path).to_dict() == data


def test_toml_rejects_none():
    """Dumping None as TOML raises an error that names the key."""
    with pytest.raises(ConfigValueError, match=r"model.norm is None"):
        show(Config({"model": {"norm": None}}), ".toml")


def test_python_text_is_compact():
    """A dict that fits on one line stays on one; a longer one is split into one item per line with trailing commas."""
    config = Config({"a": {"b": 1, "c": (2,)}, "stages": [{"name": "x" * 30, "width": i} for i in range(3)]})
    assert config.pretty_text == (
        "a = dict(b=1, c=(2,))\n"
        "stages = [\n"
        f"    dict(name='{'x' * 30}', width=0),\n"
        f"    dict(name='{'x' * 30}', width=1),\n"
        f"    dict(name='{'x' * 30}', width=2),\n"
        "]\n"
    )


def test_a_python_dump_preserves_python_types():
    """Tuples, sets, infinity and keys that are not identifiers are preserved by a Python dump."""
    data = {"x": {"t": (1, (2,)), "s": {3, 1}, "i": math.inf, "class": 1, 5: "five", "e": ()}}
    assert Config.fromstring(Config(data).pretty_text, ".py").to_dict() == data


def test_classes_and_functions_are_dumped_by_name():
    """Classes and functions are dumped by name, which the registries resolve."""
    config = Config({"model": {"type": Config, "key": sorted, "f": math.sqrt}})
    assert (
        config.pretty_text
        == "model = dict(type='stratagem.config.config.Config', key='builtins.sorted', f='math.sqrt')\n"
    )


def test_dump_without_a_path_uses_the_language_of_the_file(tmp_path):
    """A configuration from a YAML file is dumped as YAML."""
    path = tmp_path / "run.yaml"
    path.write_text("a: {b: 1}\n")
    assert Config.fromfile(path).dump() == "a:\n  b: 1\n"
    assert Config.fromfile(path).is_data
    assert not Config.fromstring("a = 1", ".py").is_data


def test_an_unknown_file_type_and_an_unwritable_path_are_file_errors(tmp_path):
    """Dumping to an unknown file type or to a path that is not writable raises an OSError that names the path."""
    with pytest.raises(ConfigFileError, match=r"cannot be written as '\.txt'"):
        Config({"a": 1}).dump(tmp_path / "run.txt")
    with pytest.raises(OSError, match="cannot be written"):
        Config({"a": 1}).dump(tmp_path / "none" / "run.py")


def test_diff_shows_the_changed_lines(tmp_path):
    """``diff`` accepts configurations or files and returns an empty string if they are equal."""
    path = tmp_path / "run.py"
    path.write_text("a = 1\nb = dict(c=2)\n")
    changed = Config.fromfile(path)
    changed.b.c = 3
    lines = Config.diff(path, changed).splitlines()
    assert [line for line in lines if line[:2] in {"-b", "+b"}] == ["-b = dict(c=2)", "+b = dict(c=3)"]
    assert Config.diff(path, str(path)) == ""
