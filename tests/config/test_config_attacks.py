"""Configurations that someone else wrote as data cannot run code, whatever they say."""

import subprocess
import sys
import time

import pytest

from stratagem.config import Config
from stratagem.errors import ConfigError, ConfigParsingError, ConfigValueError
from stratagem.registry import MODELS, OPTIMIZERS, Registry, allow_packages, trust
from stratagem.utils.data_names import DataName

DANGEROUS = [
    "os.system",
    "os:system",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "subprocess.Popen",
    "subprocess.call",
    "pdb.Pdb._getval",
    "pdb.run",
    "numpy.f2py.compile",
    "numpy.f2py.crackfortran.myeval",
    "timeit.timeit",
    "runpy.run_path",
    "importlib.import_module",
    "pickle.loads",
    "torch.load",
    "torch.hub.load",
    "torch.serialization.load",
    "torch.nn.modules.module.os.system",
    "torch.nn.os",
    "shutil.rmtree",
    "posix.system",
    "code.InteractiveInterpreter",
    "ctypes.CDLL",
    "antigravity",
    "this",
    "stratagem.registry.allow_packages",
]


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
def test_a_type_cannot_name_what_to_import(suffix, name):
    """``type`` in a data file is a registered name; a dotted path that the file chose is refused."""
    text = {
        ".yaml": f"model:\n  type: {name}\n  command: x\n",
        ".json": f'{{"model": {{"type": "{name}", "command": "x"}}}}',
        ".toml": f'[model]\ntype = "{name}"\ncommand = "x"\n',
    }[suffix]
    model = Config.fromstring(text, suffix).model
    with pytest.raises(ConfigError, match=r"data files cannot choose what is imported|is not in the"):
        MODELS.build(model)


def test_the_rule_travels_with_the_value(tmp_path):
    """A value of a data file stays refused when a Python file is based on it, and when it is merged and copied."""
    (tmp_path / "base.yaml").write_text("model: {type: os.system, inner: [{type: os.system}]}\n")
    (tmp_path / "run.py").write_text("_base_ = 'base.yaml'\nmodel = dict(command='x')\nother = _base_.model.inner[0]\n")
    config = Config.fromfile(tmp_path / "run.py")
    config.merge_from_dict({"model.command": "y"})
    plain = config.to_dict()
    for node in (plain["model"], dict(config.model.copy()), plain["other"]):
        with pytest.raises(ConfigValueError, match="data file"):
            MODELS.build(dict(node))


def test_ready_names_with_dots_stay_usable_in_data():
    """A family's own dotted names are registered names, so a data file may use them."""
    config = Config.fromstring("model: {type: torch.nn.Linear, in_features: 1, out_features: 2}\n", ".yaml")
    assert MODELS.build(config.model).out_features == 2


def test_the_program_can_allow_a_package(monkeypatch):
    """What the program allows can be named, and nothing beside it."""
    monkeypatch.setattr(trust, "_allowed", set())
    allow_packages("fractions")
    registry = Registry("number", scope="test")
    assert registry.build({"type": DataName("fractions.Fraction"), "numerator": 3}) == 3
    with pytest.raises(ConfigValueError, match="allow_packages"):
        registry.get(DataName("fractions_extra.Fraction"))


def test_a_python_file_may_name_any_path():
    """A Python configuration is a program: it names what it likes."""
    config = Config.fromstring("value = dict(type='fractions.Fraction', numerator=3)\n", ".py")
    assert Registry("number", scope="test").build(config.value) == 3


@pytest.mark.parametrize("key", ["_scope_", "default_scope"])
def test_a_scope_cannot_import_a_package(key, tmp_path, monkeypatch):
    """The scope that a data file names is not imported: a package of that name would run."""
    package = tmp_path / "evil_scope"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "registry.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    scope = Config.fromstring(f"{key}: evil_scope\n", ".yaml")[key]
    with pytest.raises(ConfigError):
        OPTIMIZERS.build({"type": "SGD", "params": [], "_scope_": scope})


YAML_OBJECTS = [
    "!!python/object/apply:os.system ['true']",
    "!!python/object/new:os.system ['true']",
    "!!python/object:os.system {}",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1]",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!timestamp 2026-01-01",
    "!custom 1",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['true']",
]


@pytest.mark.parametrize("value", YAML_OBJECTS)
def test_yaml_makes_plain_data_only(value):
    """A tag that asks for an object is refused with its line."""
    with pytest.raises(ConfigParsingError, match=r"<string>:2 is not valid YAML: the tag"):
        Config.fromstring(f"a: 1\nb: {value}\n", ".yaml")


def test_a_redefined_tag_prefix_does_not_help():
    """%TAG lets a file abbreviate a tag; what it stands for is refused all the same."""
    text = "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\na: !os.system ['true']\n"
    with pytest.raises(ConfigParsingError, match=r"os\.system"):
        Config.fromstring(text, ".yaml")


BOMBS = {
    "brackets json": (".json", "[" * 1_000_000),
    "closed brackets json": (".json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep objects json": (".json", '{"a":' * 500 + "1" + "}" * 500),
    "brackets yaml": (".yaml", "a: " + "[" * 1_000_000),
    "braces yaml": (".yaml", "{a: " * 100_000),
    "dashes yaml": (".yaml", "a:\n " + "- " * 50_000 + "x"),
    "brackets toml": (".toml", "a = " + "[" * 1_000_000),
    "dotted toml": (".toml", "a" + ".a" * 2_000 + " = 1"),
    "brackets py": (".py", "a = " + "[" * 1_000_000),
    "aliases yaml": (
        ".yaml",
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    ),
    "merge keys yaml": (
        ".yaml",
        "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)),
    ),
    "alias of itself yaml": (".yaml", "a: &a [*a]\n"),
    "blanks json": (".json", '{"a": {{ $A' + " " * 1_000_000 + "x"),
    "blanks in a default json": (".json", '{"a": {{ $A:' + " " * 1_000_000 + "{"),
    "repeated keys json": (".json", "{" + '"a": 1, ' * 100_000 + '"b": 1}'),
    "digits json": (".json", '{"a": ' + "9" * 10_000 + "}"),
    "digits yaml": (".yaml", "a: " + "9" * 10_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_text_beyond_reason_is_refused_quickly(name):
    """Nesting without end, aliases of aliases and endless numbers are refused, without filling memory or time."""
    suffix, text = BOMBS[name]
    start = time.perf_counter()
    with pytest.raises(ConfigParsingError):
        Config.fromstring(text, suffix)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".yaml", "a: 1\nb: 2\na: 3\n"),
        (".yaml", "x: {a: 1, a: 2}\n"),
        (".json", '{"a": 1, "a": 2}'),
        (".json", '{"x": [{"a": 1, "b": 2, "a": 1}]}'),
        (".toml", "a = 1\na = 2\n"),
        (".toml", "[x]\na = 1\n[x]\n"),
    ],
)
def test_a_repeated_key_is_refused(suffix, text):
    """A key given twice would silently lose one value."""
    with pytest.raises(ConfigParsingError):
        Config.fromstring(text, suffix)


@pytest.mark.parametrize("text", ["- 1\n", "7\n", '"text"\n', "1: x\n", "null: x\n"])
def test_a_data_file_holds_a_mapping_of_names(text):
    """A list, a number or keys that are no names are no configuration."""
    with pytest.raises(TypeError):
        Config.fromstring(text, ".yaml")


def test_custom_imports_in_data_are_refused(tmp_path):
    """A data file cannot ask for imports, also not as a base of a Python file."""
    (tmp_path / "base.yaml").write_text("x: 1\ncustom_imports: {imports: [os]}\n")
    (tmp_path / "run.py").write_text("_base_ = 'base.yaml'\n")
    for name in ("base.yaml", "run.py"):
        with pytest.raises(ConfigParsingError, match=r"base.yaml:2: a data file cannot import modules"):
            Config.fromfile(tmp_path / name)


@pytest.mark.parametrize("value", ["true", "1", "'yes'"])
def test_remote_code_in_data_is_refused(value):
    """A data file cannot ask a library to download code and run it."""
    with pytest.raises(ConfigParsingError, match="trust_remote_code"):
        Config.fromstring(
            f"model: {{type: transformers.AutoModel.from_pretrained, trust_remote_code: {value}}}\n", ".yaml"
        )


@pytest.mark.parametrize("base", ["run.py", "../outside.yaml", "/etc/hosts.yaml", "sub/../../outside.yaml"])
def test_the_base_of_a_data_file_is_data_below_its_folder(tmp_path, base):
    """A data file can be based on no program, and on no file that lies outside of its folder."""
    folder = tmp_path / "inside"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.yaml").write_text("secret: 1\n")
    (folder / "run.py").write_text("raise SystemExit('ran')\n")
    (folder / "top.yaml").write_text(f"_base_: {base}\n")
    with pytest.raises(ConfigValueError, match=r"cannot be based on the program|lies outside of"):
        Config.fromfile(folder / "top.yaml")


def test_a_link_does_not_lead_out(tmp_path):
    """A symbolic link beside a data file does not reach what lies elsewhere."""
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "outside.yaml").write_text("secret: 1\n")
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (folder / "top.yaml").write_text("_base_: link.yaml\n")
    with pytest.raises(ConfigValueError, match="lies outside of"):
        Config.fromfile(folder / "top.yaml")


def test_the_root_says_how_far_a_base_may_climb(tmp_path):
    """Naming the folder that holds both files, the usual ../shared layout works for data too."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text("x: 1\n")
    (tmp_path / "runs" / "run.yaml").write_text("_base_: ../shared/base.yaml\n")
    assert Config.fromfile(tmp_path / "runs" / "run.yaml", root=tmp_path) == {"x": 1}


@pytest.mark.parametrize("key", ["__class__", "__dict__", "__reduce__", "_owner", "to_dict", "__init__"])
def test_keys_cannot_replace_methods(key):
    """A key with the name of a method or an internal attribute stays a key."""
    config = Config.fromstring(f"x: {{{key}: 1}}\n", ".yaml")
    assert config.x[key] == 1
    assert config.to_dict() == {"x": {key: 1}}
    assert str(config.where("x")) == "<string>:1"


def test_loading_data_imports_nothing(tmp_path):
    """Loading a data file full of dotted names imports none of them."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {type: torch.nn.Linear, hook: xmlrpc.client, f: numpy.f2py}\n")
    code = (
        "import sys; from stratagem.config import Config\n"
        f"Config.fromfile({str(path)!r})\n"
        "print([name for name in ('torch', 'numpy', 'xmlrpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numbers_of_yaml_are_read_as_people_mean_them():
    """1e-3 is a number, a date and a clock time are texts."""
    config = Config.fromstring("a: 1e-3\nb: 2026-01-01\nc: 12:30:45\nd: 0x10\ne: .inf\nf: 010\n", ".yaml")
    assert config == {"a": 0.001, "b": "2026-01-01", "c": "12:30:45", "d": 16, "e": float("inf"), "f": 10}


def test_what_someone_else_wrote_is_read_as_data_only(tmp_path, monkeypatch):
    """Reading with fromdata refuses programs and does not tell the environment's secrets."""
    monkeypatch.setenv("TOKEN", "secret")
    (tmp_path / "run.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ConfigValueError, match="is a program and would run"):
        Config.fromdata(tmp_path / "run.py")
    (tmp_path / "run.yaml").write_text("x: 1\nname: '{{ $TOKEN }}'\n")
    with pytest.raises(ConfigValueError, match=r"run.yaml:2: environment variables are not read here"):
        Config.fromdata(tmp_path / "run.yaml")
    with pytest.raises(ConfigValueError, match="environment variables"):
        Config.fromfile(tmp_path / "run.yaml", use_environment_variables=False)
    (tmp_path / "run.yaml").write_text("x: 1\n")
    assert Config.fromdata(tmp_path / "run.yaml") == {"x": 1}
