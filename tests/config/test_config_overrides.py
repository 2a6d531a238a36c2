import contextlib

import pytest

from stratagem.config import Config, parse_overrides
from stratagem.errors import ConfigParsingError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("1.5", 1.5),
        ("1e-3", 0.001),
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("resnet", "resnet"),
        ("'1'", "1"),
        ("", ""),
        ("1,2", [1, 2]),
        ("1,", [1]),
        ("[1, a, 2.0]", [1, "a", 2.0]),
        ("[]", []),
        ("(1, 2)", (1, 2)),
        ("[a,(b,c)]", ["a", ("b", "c")]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("a=b", "a=b"),
        ("https://host:80/x", "https://host:80/x"),
        ("2026_01", "2026_01"),
        ("007", "007"),
    ],
)
def test_values_are_read_as_what_they_look_like(text, value):
    """Numbers, booleans, None, lists, tuples and dicts are recognised; everything else is text."""
    parsed = parse_overrides([f"key={text}"])["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "open('x')", "lambda: 1"])
def test_values_are_never_evaluated(text):
    """Code on the command line is text or an error, never run."""
    with contextlib.suppress(ConfigParsingError):
        assert isinstance(parse_overrides([f"key={text}"])["key"], str | list)


@pytest.mark.parametrize("pair", ["model.depth", "=3", "a..b=1", "x=[1", "x='a", "x={a}", "x=[1]2"])
def test_what_is_no_override_is_refused(pair):
    """A missing ``=``, an empty key and an open bracket or quote are errors that show the text."""
    with pytest.raises(ConfigParsingError):
        parse_overrides([pair])


def test_overrides_reach_into_lists():
    """A number in the key means an item of a list, also inside of what it holds."""
    config = Config({"stages": [{"depth": 1}, {"depth": 2}]})
    config.merge_from_dict(parse_overrides(["stages.1.depth=7", "stages.0={depth: 5}"]))
    assert config == {"stages": [{"depth": 5}, {"depth": 7}]}


def test_an_index_outside_of_the_list_is_a_key_error():
    """There is no item to change beyond the end of a list."""
    with pytest.raises(KeyError, match=r"stages.2.*list of 2 items"):
        Config({"stages": [1, 2]}).merge_from_dict({"stages.2": 3})


def test_without_list_keys_a_dict_replaces_no_list():
    """allow_list_keys=False takes digits as keys, which a list does not have."""
    with pytest.raises(TypeError):
        Config({"stages": [1, 2]}).merge_from_dict({"stages.0": 3}, allow_list_keys=False)


def test_overriding_below_a_number_is_refused():
    """A key below a value that has no keys is a TypeError."""
    with pytest.raises(TypeError, match="model is a dict here and a int"):
        Config({"model": 3}).merge_from_dict({"model.depth": 1})


def test_merging_changes_neither_the_argument_nor_shared_values():
    """What was given is left as it was."""
    options = {"model": {"depth": 3}}
    config = Config({"model": {"width": 1}})
    config.merge_from_dict(options)
    config.model.depth = 9
    assert options == {"model": {"depth": 3}}
