"""A written configuration loads as an equal one, or writing it is an error that names the key."""

import datetime as dt
import functools
import math
import re
import signal
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stratagem.config import Config, show
from stratagem.errors import ConfigValueError
from tests.support.properties import examples

SUFFIXES = ["py", "yaml", "json", "toml"]


class Color(Enum):
    """An enum that can be imported."""

    RED = "red"


class Level(IntEnum):
    """An enum of numbers."""

    HIGH = 3


class Mode(StrEnum):
    """An enum of strings."""

    FAST = "fast"


class Pair(NamedTuple):
    """A tuple with names."""

    first: int
    second: int


class Unknown:
    """An object without a representation as text."""


NAMED = [
    *(
        "12e3456",
        "1e5",
        "1E5",
        "-1e3",
        "0o17",
        "0x1F",
        "1_000",
        "1_0",
        "017",
        "12:30",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "~",
    ),
    *("null", "Null", "true", "False", ".inf", "-.INF", ".nan", "nan", "inf", "2024-01-01", "2024-01-01 10:00:00"),
    *(
        "",
        " ",
        " x ",
        "#x",
        "a: b",
        "- a",
        "[1]",
        "{a}",
        "*a",
        "&a",
        "!a",
        "!!int 3",
        "%a",
        "@a",
        "`a`",
        "'",
        '"',
        "|",
        ">",
    ),
    *(
        "a\nb",
        "a\r\nb",
        "\t",
        "\x00",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufeff",
        "\U0001f600",
        "\\",
        "a\\nb",
        "=",
        "<<",
        "?",
        "-",
    ),
    *("é", "x" * 300, "word " * 60, "\ud800", "1.", ".5", "+1", "-0", "1e", "e5", "0b1", "...", "---"),
]
VALUES: dict[str, Any] = {
    **{repr(text): text for text in NAMED},
    **{repr(value): value for value in (0, -1, 2**70, True, False, None, 0.1, -0.0, 1e-300, 1e16, 1e300, math.pi)},
    **{repr(value): value for value in (math.inf, -math.inf, math.nan)},
    "np.float64": np.float64(0.1) * np.sqrt(2.0),
    "np.float32": np.float32(0.1),
    "np.float16": np.float16(0.1),
    "np.int64": np.int64(5),
    "np.uint8": np.uint8(255),
    "np.bool_": np.bool_(True),
    "np.str_": np.str_("1e5"),
    "np.nan": np.float32(math.nan),
    "np.complex64": np.complex64(1 + 2j),
    "np.longdouble": np.longdouble("0.1"),
    "np.datetime64": np.datetime64("2024-01-01"),
    "np.array": np.arange(3),
    "np.dtype": np.dtype("float32"),
    "IntEnum": signal.SIGTERM,
    "own IntEnum": Level.HIGH,
    "StrEnum": Mode.FAST,
    "Enum": Color.RED,
    "IntFlag": re.IGNORECASE | re.MULTILINE,
    "range": range(1, 9, 2),
    "slice": slice(None, 3),
    "complex": complex(1, math.inf),
    "tuple": (1, (2, "1e5"), ()),
    "namedtuple": Pair(1, 2),
    "torch.Size": torch.Size([2, 3]),
    "set": {3, 1, "a"},
    "empty set": set(),
    "frozenset": frozenset({(1, 2), 3}),
    "set in a list": [{"a": {1}}],
    "bytes": b"\x00\xff'",
    "bytearray": bytearray(b"a"),
    "Path": Path("a/b"),
    "PurePosixPath": PurePosixPath("a/b"),
    "PureWindowsPath": PureWindowsPath("a/b"),
    "date": dt.date(2024, 2, 29),
    "datetime": dt.datetime(2024, 2, 29, 1, 2, 3, 4),
    "datetime in UTC": dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
    "datetime with an offset": dt.datetime(2024, 2, 29, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=30))),
    "datetime with a zone": dt.datetime(2024, 2, 29, tzinfo=ZoneInfo("UTC")),
    "time": dt.time(1, 2),
    "timedelta": dt.timedelta(days=1, seconds=2),
    "Decimal": Decimal("0.10"),
    "Fraction": Fraction(1, 3),
    "UUID": UUID(int=5),
    "dtype": torch.bfloat16,
    "memory format": torch.channels_last,
    "layout": torch.strided,
    "device": torch.device("cuda", 1),
    "tensor": torch.zeros(2),
    "lambda": lambda value: value,
    "lambda in a list": [1, {"f": lambda value: value}],
    "partial": functools.partial(int, base=2),
    "object": Unknown(),
    "bound method": [].append,
    "iterator": iter([]),
    "number as key": {1: "a", 2.5: "b"},
    "tuple as key": {(1, 2): "a"},
    "None as key": {None: 1},
    "bool as key": {True: 1},
    "enum as key": {Level.HIGH: 1},
    "keyword as key": {"class": 1, "1e5": 2, "": 3, "a b": 4, "a.b": 5, "yes": 6},
    "empty": {"list": [], "dict": {}},
    "mixed list": [1, [2, {"a": [{"b": "1e5"}]}], "x"],
}


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, except that NaN equals NaN, and numbers, tuples and lists have the same kind."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        alike = isinstance(one, list) == isinstance(other, list) and len(one) == len(other)
        return alike and all(map(is_same, one, other))
    if isinstance(one, bool | np.bool_) != isinstance(other, bool | np.bool_):
        return False
    if isinstance(one, complex) and isinstance(other, complex):
        return is_same(one.real, other.real) and is_same(one.imag, other.imag)
    if isinstance(one, float | np.floating) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other) and isinstance(one, str) == isinstance(other, str)


def round_trip(folder: Path, suffix: str, value: Any) -> Any:
    """Return a value after its configuration was dumped and loaded, or the error of the dump."""
    path = folder / f"run.{suffix}"
    try:
        Config({"vars": {"deep": [{"v": value}]}}).dump(path)
    except ConfigValueError as error:
        return error
    return Config.fromfile(path).to_dict()["vars"]["deep"][0]["v"]


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_loads_as_it_was_or_is_refused(tmp_path: Path, kind: str):
    """A value is never loaded as a different value or as text; if it cannot be dumped, the error names its key."""
    for suffix in SUFFIXES:
        loaded = round_trip(tmp_path, suffix, VALUES[kind])
        if isinstance(loaded, ConfigValueError):
            assert "vars.deep.0.v" in str(loaded), suffix
        else:
            assert is_same(VALUES[kind], loaded), suffix


PLAIN = {"np.float64", "np.float32", "np.float16", "np.int64", "np.uint8", "np.bool_", "np.str_", "np.nan", "IntEnum"}
PLAIN |= {"own IntEnum", "StrEnum", "IntFlag", "empty", "mixed list"} | {
    repr(text) for text in NAMED if text != "\ud800"
}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strings_and_numbers_of_all_kinds_can_be_written(tmp_path: Path, suffix: str):
    """Strings that look like numbers, NumPy scalars and enums of numbers and strings can be dumped in every language."""
    for kind in sorted(PLAIN):
        assert is_same(VALUES[kind], round_trip(tmp_path, suffix, VALUES[kind])), kind


REFUSED = {"tensor", "lambda", "lambda in a list", "partial", "object", "bound method", "iterator", "np.array"}
REFUSED |= {"np.dtype", "np.datetime64", "np.longdouble", "datetime with a zone"}


@pytest.mark.parametrize("kind", sorted(VALUES.keys() - REFUSED))
def test_python_can_represent(tmp_path: Path, kind: str):
    """Python files keep ranges, paths, sets, bytes, dates, dtypes and enums."""
    assert is_same(VALUES[kind], round_trip(tmp_path, "py", VALUES[kind]))


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_python_refuses(tmp_path: Path, kind: str):
    """Objects that no expression can recreate are refused instead of written as their ``repr``."""
    assert isinstance(round_trip(tmp_path, "py", VALUES[kind]), ConfigValueError)


TEXT = st.text(st.characters(), max_size=20) | st.from_regex(r"[-+]?[0-9_.:]*[eExob]?[0-9a-f_]*", fullmatch=True)
LEAVES = st.one_of(
    TEXT,
    st.integers(),
    st.floats(),
    st.floats(width=32).map(np.float32),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
    st.sampled_from([Level.HIGH, Color.RED, Mode.FAST, torch.float16]),
    st.dates(),
    st.datetimes(),
    st.timedeltas(),
    st.binary(max_size=8),
    st.builds(range, st.integers(-9, 9)),
    st.frozensets(st.integers() | TEXT, max_size=3),
    st.complex_numbers(),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(TEXT | st.integers(), inner, max_size=3),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=examples(150), deadline=None)
@given(value=TREES)
def test_any_tree_loads_as_it_was_or_is_refused(tmp_path_factory: Any, suffix: str, value: Any):
    """Any combination of values loads with equal values or raises an error that names the key."""
    loaded = round_trip(tmp_path_factory.mktemp("dump"), suffix, value)
    if isinstance(loaded, ConfigValueError):
        assert "vars.deep.0.v" in str(loaded)
    else:
        assert is_same(value, loaded)


@pytest.mark.parametrize("key", ["class", "__private", "_base_", "a b", 5])
def test_a_top_level_key_that_python_cannot_assign_is_refused(key: Any):
    """A Python file has one assignment per top-level key; names with two underscores are not read."""
    with pytest.raises(ConfigValueError, match=re.escape(repr(key))):
        show(Config({key: 1}))


def test_a_top_level_key_can_have_the_name_of_a_builtin(tmp_path: Path):
    """Expressions that use the builtin are written before the key of the same name."""
    data = {"dict": {"a": 1}, "set": 1, "float": 2, "x": {"s": {1}, "f": math.inf}}
    Config(data).dump(tmp_path / "run.py")
    assert Config.fromfile(tmp_path / "run.py").to_dict() == data


@pytest.mark.parametrize("suffix", [".py", ".yaml", ".json", ".toml"])
def test_a_kept_configuration_marks_a_value_that_it_cannot_contain(tmp_path: Path, suffix: str):
    """The configuration that a run keeps can be loaded; the value is an error that names its key when it is used."""
    path = tmp_path / f"run{suffix}"
    path.write_text(show(Config({"vars": {"f": lambda value: value, "g": 1}}), suffix, mark_unsupported=True))
    kept = Config.fromfile(path)
    assert kept.vars.g == 1
    with pytest.raises(ConfigValueError, match=r"vars\.f could not be saved"):
        kept.vars["f"]
    assert show(kept, suffix, mark_unsupported=True) == path.read_text()
