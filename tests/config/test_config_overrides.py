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
def test_values_are_parsed_by_their_syntax(text, value):
    """Numbers, booleans, None, lists, tuples and dicts are parsed; everything else is a string."""
    parsed = parse_overrides([f"key={text}"])["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "open('x')", "lambda: 1"])
def test_values_are_never_evaluated(text):
    """Code on the command line is a string or an error and never executed."""
    with contextlib.suppress(ConfigParsingError):
        assert isinstance(parse_overrides([f"key={text}"])["key"], str | list)


@pytest.mark.parametrize("pair", ["model.depth", "=3", "a..b=1", "x=[1", "x='a", "x={a}", "x=[1]2"])
def test_an_invalid_override_is_rejected(pair):
    """A missing ``=``, an empty key or an unclosed bracket or quote raises an error."""
    with pytest.raises(ConfigParsingError):
        parse_overrides([pair])


def test_overrides_reach_into_lists():
    """A number in an override's key selects a list item, including keys within that item."""
    config = Config({"stages": [{"depth": 1}, {"depth": 2}]})
    config.merge_from_dict(parse_overrides(["stages.1.depth=7", "stages.0={depth: 5}"]))
    assert config == {"stages": [{"depth": 5}, {"depth": 7}]}


def test_an_index_out_of_range_is_a_key_error():
    """An index beyond the end of a list raises a KeyError."""
    with pytest.raises(KeyError, match=r"stages.2.*list of 2 items"):
        Config({"stages": [1, 2]}).merge_from_dict({"stages.2": 3})


def test_list_items_cannot_be_set_without_list_keys():
    """With ``allow_list_keys=False``, digits are dict keys and cannot select list items."""
    with pytest.raises(TypeError):
        Config({"stages": [1, 2]}).merge_from_dict({"stages.0": 3}, allow_list_keys=False)


def test_overriding_below_a_number_is_rejected():
    """Setting a key below a value that is not a container raises a TypeError."""
    with pytest.raises(TypeError, match="model is a dict here, but a int"):
        Config({"model": 3}).merge_from_dict({"model.depth": 1})


def test_merging_does_not_modify_its_argument():
    """Merging modifies neither the argument nor values shared with it."""
    options = {"model": {"depth": 3}}
    config = Config({"model": {"width": 1}})
    config.merge_from_dict(options)
    config.model.depth = 9
    assert options == {"model": {"depth": 3}}
