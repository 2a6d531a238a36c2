import pytest

from stratagem.config import ChangeKind, Config, Origin, explain, parse_overrides


@pytest.fixture
def config(tmp_path):
    """Two files and an override that all set values of the model."""
    (tmp_path / "base.py").write_text(
        "model = dict(\n    type='Net',\n    depth=3,\n    stages=[\n        dict(width=8),\n        dict(width=16)],\n"
        "    head=dict(classes=10, bias=True))\nlr = 0.1\n"
    )
    (tmp_path / "run.yaml").write_text("_base_: data.yaml\nx: 1\n")
    (tmp_path / "run.py").write_text(
        "_base_ = 'base.py'\nmodel = dict(\n    depth=5,\n    head=dict(_delete_=True,\n        classes=7))\n"
    )
    config = Config.fromfile(tmp_path / "run.py")
    config.merge_from_dict(parse_overrides(["model.stages.1.width=32"]))
    return config


def name(origin):
    """Return an origin with only the file name instead of the full path."""
    return str(origin).rpartition("/")[2]


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model", "base.py:1"),
        ("model.type", "base.py:2"),
        ("model.depth", "run.py:3"),
        ("model.stages", "base.py:4"),
        ("model.stages.0.width", "base.py:5"),
        ("model.stages.1.width", "--set model.stages.1.width"),
        ("model.head", "run.py:4"),
        ("model.head.classes", "run.py:5"),
        ("lr", "base.py:8"),
    ],
)
def test_where_names_the_file_and_line_of_a_value(config, path, place):
    """``where`` returns the file and line that set a value, through bases, ``_delete_`` and overrides."""
    assert name(config.where(path)) == place


@pytest.mark.parametrize("path", ["model.head.bias", "nothing", "model.stages.5", "lr.x"])
def test_a_missing_value_has_no_origin(config, path):
    """A value that was deleted or never set has no origin."""
    assert config.where(path) is None


def test_a_value_set_by_the_program_has_the_program_as_origin(config):
    """The origin of a value that was set after loading is the program, not a file."""
    config.model.depth = 9
    config.model.extra = 1
    assert str(config.where("model.depth")) == "the program"
    assert str(config.where("model.extra")) == "the program"
    assert name(config.where("model.type")) == "base.py:2"


def test_changes_are_listed_in_order(config):
    """Explain lists where a value was set, replaced and removed."""
    changes = [(name(change.origin), change.kind, change.value) for change in config.explain("model.depth")]
    assert changes == [("base.py:3", ChangeKind.SET, 3), ("run.py:3", ChangeKind.REPLACED, 5)]
    changes = [(name(change.origin), change.kind) for change in config.explain("model.head.bias")]
    assert changes == [("base.py:7", ChangeKind.SET), ("run.py:4", ChangeKind.REMOVED)]
    changes = [(name(change.origin), change.kind) for change in config.explain("model")]
    assert changes == [
        ("base.py:1", ChangeKind.SET),
        ("run.py:2", ChangeKind.MERGED),
        ("--set model", ChangeKind.MERGED),
    ]


def test_explain_writes_one_line_per_change(config):
    """The explanation contains the path, then the file and line, the action and the value of each change."""
    lines = explain(config, "model.depth").splitlines()
    assert lines[0] == "model.depth"
    assert [line.split("/")[-1].split() for line in lines[1:]] == [
        ["base.py:3", "set", "3"],
        ["run.py:3", "replaced", "5"],
    ]
    config.model.depth = 1
    assert explain(config, "model.depth").splitlines()[-1] == "  the program changed it later"


def test_explaining_an_unknown_path_suggests_the_closest_key(config):
    """Explaining a misspelled path raises an error with the closest key."""
    with pytest.raises(KeyError, match="Did you mean 'depth'"):
        explain(config, "model.dept")


@pytest.mark.parametrize(
    ("suffix", "text", "lines"),
    [
        (".yaml", "a:\n  b:\n    - 1\n    - c: 2\n", {"a": 1, "a.b": 2, "a.b.0": 3, "a.b.1.c": 4}),
        (".json", '{\n"a": {\n"b": [\n1,\n{"c": 2}]}}', {"a": 2, "a.b": 3, "a.b.0": 4, "a.b.1.c": 5}),
        (".json", '{"x": "a,\\"b{",\n"a": []\n, "c": {}, "d":\n 1}', {"x": 1, "a": 2, "c": 3, "d": 3}),
        (
            ".toml",
            "x = 1\n[a]\nb = [1]\n[[a.c]]\nd = 1\n[[a.c]]\nd = 2\n",
            {"a": 2, "a.b": 3, "a.c.0.d": 5, "a.c.1.d": 7},
        ),
        (".py", "w = [\n    1,\n    2]\na = dict(\n    w=w)\n", {"w.1": 3, "a.w": 5, "a.w.0": 2}),
        (".py", "a = dict(b=1)\na['c'] = 2\na.update(\n    d=3)\n", {"a": 1, "a.b": 1, "a.c": 2, "a.d": 4}),
        (".py", "a = {\n  'b': 1,\n **dict(c=2)}\n", {"a.b": 2, "a.c": 1}),
        (".py", "x = dict(c=1)\na, b = dict(\n    d=2), x\n", {"a.d": 3, "b": 2, "b.c": 1}),
        (".py", "a = [dict(b=i)\n for i in range(2)]\n", {"a.1.b": 1}),
    ],
)
def test_lines_are_known_in_every_language(suffix, text, lines):
    """A value's line is that of its key, or of the innermost enclosing expression in the source."""
    config = Config.fromstring(text, suffix)
    assert {path: config.where(path).line for path in lines} == lines


def test_a_node_reports_its_location(config):
    """A node reports its path and location for error messages."""
    assert config.model.stages[1].__source_position__("width") == "model.stages.1.width (--set model.stages.1.width)"
    assert name(config.model.head.__source_position__()) == "run.py:4)"


def test_an_origin_formats_as_file_and_line():
    """``str(origin)`` has the ``file:line`` format that editors can open."""
    assert str(Origin("configs/run.py", 12)) == "configs/run.py:12"
    assert str(Origin("--set model.depth")) == "--set model.depth"
