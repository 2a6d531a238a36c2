"""Untrusted data configurations cannot run code, whatever they contain."""

import copy
import json
import pickle
import subprocess
import sys
import time

import pytest
import torch
import yaml
from torch import nn

from stratagem.config import Config
from stratagem.config.node import ConfigDict
from stratagem.errors import ConfigError, ConfigParsingError, ConfigTypeError, ConfigValueError, MissingDependencyError
from stratagem.parallel.fsdp.options import FSDPOptions
from stratagem.registry import METRICS, MODELS, OPTIMIZERS, Registry, allow_packages, import_policy
from stratagem.strategies.setup.building import compile_model
from stratagem.strategies.setup.environment import set_up_environment
from stratagem.utils.data_names import DataName, data_keys
from stratagem.utils.data_rules import refused_arguments

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
def test_a_type_cannot_choose_what_is_imported(suffix, name):
    """``type`` in a data file must be a registered name; a dotted path is rejected."""
    text = {
        ".yaml": f"model:\n  type: {name}\n  command: x\n",
        ".json": f'{{"model": {{"type": "{name}", "command": "x"}}}}',
        ".toml": f'[model]\ntype = "{name}"\ncommand = "x"\n',
    }[suffix]
    model = Config.fromstring(text, suffix).model
    with pytest.raises(ConfigError, match=r"data files cannot choose what is imported|is not in the"):
        MODELS.build(model)


def test_the_restriction_follows_the_value(tmp_path):
    """A value from a data file is still rejected after inheritance by a Python file, merging and copying."""
    (tmp_path / "base.yaml").write_text("model: {type: os.system, inner: [{type: os.system}]}\n")
    (tmp_path / "run.py").write_text("_base_ = 'base.yaml'\nmodel = dict(command='x')\nother = _base_.model.inner[0]\n")
    config = Config.fromfile(tmp_path / "run.py")
    config.merge_from_dict({"model.command": "y"})
    plain = config.to_dict()
    for node in (plain["model"], dict(config.model.copy()), plain["other"]):
        with pytest.raises(ConfigValueError, match="data file"):
            MODELS.build(dict(node))


def test_built_in_dotted_names_can_be_used_in_data_files():
    """The dotted names of built-in sources are registered names and can be used in data files."""
    config = Config.fromstring("model: {type: torch.nn.Linear, in_features: 1, out_features: 2}\n", ".yaml")
    assert MODELS.build(config.model).out_features == 2


def test_the_program_can_allow_a_package(monkeypatch):
    """Names in a package that the program allows can be used, but not in packages with the same prefix."""
    monkeypatch.setattr(import_policy, "_allowed", set())
    allow_packages("fractions")
    registry = Registry("number", scope="test")
    assert registry.build({"type": DataName("fractions.Fraction"), "numerator": 3}) == 3
    with pytest.raises(ConfigValueError, match="allow_packages"):
        registry.get(DataName("fractions_extra.Fraction"))


def test_a_python_file_may_name_any_path():
    """A Python configuration is a program and may name any path."""
    config = Config.fromstring("value = dict(type='fractions.Fraction', numerator=3)\n", ".py")
    assert Registry("number", scope="test").build(config.value) == 3


@pytest.mark.parametrize("key", ["_scope_", "default_scope"])
def test_a_scope_cannot_import_a_package(key, tmp_path, monkeypatch):
    """A scope in a data file is not imported, because importing the package would run code."""
    package = tmp_path / "evil_scope"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "registry.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    scope = Config.fromstring(f"{key}: evil_scope\n", ".yaml")[key]
    with pytest.raises(ConfigError):
        OPTIMIZERS.build({"type": "SGD", "params": [], "_scope_": scope})


@pytest.mark.parametrize("scope", ["[os]", "3", "{a: os}", "true"])
def test_a_scope_must_be_a_string(scope):
    """A scope that is not a string is rejected."""
    with pytest.raises(ConfigTypeError, match="The scope must be the name of a package"):
        MODELS.build(Config.fromstring(f"model: {{type: Identity, _scope_: {scope}}}\n", ".yaml").model)


@pytest.fixture
def evil_package(tmp_path, monkeypatch):
    """A package with a configuration in the working directory; importing it ends the test run."""
    package = tmp_path / "evil_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "registry.py").write_text("raise SystemExit('imported')\n")
    (package / "base.yaml").write_text("model: {type: Linear, in_features: 1, out_features: 1}\nmetric: {type: Sum}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert "evil_package" not in sys.modules


def test_a_base_in_a_package_does_not_import_the_package(evil_package):
    """A base in a package provides values, but no registry imports the package."""
    (evil_package / "run.yaml").write_text("_base_: 'evil_package::base.yaml'\n")
    config = Config.fromfile(evil_package / "run.yaml")
    assert config.model._scope_ == "evil_package"
    for registry, node in ((MODELS, config.model), (METRICS, config.metric), (MODELS, dict(config.to_dict()["model"]))):
        with pytest.raises(
            ConfigValueError, match=r"refers to the scope 'evil_package'.*allow_packages\('evil_package'\)"
        ):
            registry.build(node)


def test_a_base_in_a_package_of_a_data_base_does_not_import_the_package(evil_package):
    """A package named by a data file is not imported for a Python file that inherits from it."""
    (evil_package / "base.yaml").write_text("_base_: 'evil_package::base.yaml'\n")
    (evil_package / "run.py").write_text("_base_ = 'base.yaml'\nmodel = dict(bias=False)\n")
    with pytest.raises(ConfigValueError, match="refers to the scope 'evil_package'"):
        MODELS.build(Config.fromfile(evil_package / "run.py").model)


def test_the_package_of_a_base_is_imported_if_the_program_allows_it(tmp_path, monkeypatch):
    """A package that the program allows is imported, so its registries are found."""
    (tmp_path / "based_package").mkdir()
    (tmp_path / "based_package" / "__init__.py").write_text("")
    (tmp_path / "based_package" / "registry.py").write_text(
        "from stratagem.registry import MODELS, Registry\n"
        "OWN = Registry('model', parent=MODELS, scope='based_package')\n"
        "OWN.register_module('Ten', module=lambda: 10)\n"
    )
    (tmp_path / "based_package" / "base.yaml").write_text("model: {type: Ten}\n")
    (tmp_path / "run.yaml").write_text("_base_: 'based_package::base.yaml'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(import_policy, "_allowed", set())
    allow_packages("based_package")
    try:
        assert MODELS.build(Config.fromfile(tmp_path / "run.yaml").model) == 10
    finally:
        MODELS._children.pop("based_package", None)
        for name in ("based_package", "based_package.registry"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("package", ["__main__", "sys", "os", "no_such_package", "os.path"])
def test_a_base_in_something_other_than_a_package_is_rejected(package, tmp_path):
    """A module without a folder cannot contain base configurations."""
    (tmp_path / "run.yaml").write_text(f"_base_: '{package}::base.yaml'\n")
    with pytest.raises(MissingDependencyError, match="is not installed"):
        Config.fromfile(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["evil_package.Net", "evil_package.registry.Net", "stratagem.evil_package.Net"])
def test_a_scope_prefix_does_not_import_the_package(name, evil_package):
    """``package.Name`` only searches existing registries."""
    with pytest.raises(ConfigError):
        MODELS.build(Config.fromstring(f"model: {{type: {name}}}\n", ".yaml").model)


# ---- torch.compile -------------------------------------------------------------------------------------------------

COMPILE_ATTACKS = [
    "{options: {cpp.cxx: [./evil.sh]}}",
    "{options: {}}",
    "{options: {max_autotune: true}}",
    "{mode: {cpp.cxx: [./evil.sh]}}",
    "{mode: no-such-mode}",
    "{backend: {}}",
    "{backend: [inductor]}",
    "{backend: os.system}",
    "{backend: 'os:system'}",
    "{backend: no_such_backend}",
    "{backend: tvm}",
    "{backend: dynamo_minifier_backend}",
    "{fullgraph: [./evil.sh]}",
    "{dynamic: os.system}",
    "{disable: './evil.sh'}",
    "{name: os.system}",
    "{shapes_spec: os.system}",
    "{target: __class__}",
    "{target: _call_impl}",
    "{target: layer}",
    "{target: os.system}",
    "{target: [forward]}",
    "{target: forward.__globals__}",
]


class Net(nn.Module):
    """A model with one layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs):
        return self.layer(inputs)


@pytest.mark.parametrize("section", COMPILE_ATTACKS)
@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_compiler_arguments_in_a_data_file_are_on_an_allow_list(section, suffix, tmp_path):
    """Data files cannot set Inductor options, which name programs to run, even through a Python file."""
    (tmp_path / "base.yaml").write_text(f"compile: {section}\n")
    (tmp_path / "run.yaml").write_text("_base_: base.yaml\n")
    (tmp_path / "run.py").write_text("_base_ = 'base.yaml'\n")
    model = Net()
    with pytest.raises(ConfigError, match=r"compile: |no such method|is not known"):
        compile_model(model, Config.fromfile(tmp_path / f"run{suffix}").compile)
    assert "forward" not in vars(model)


def test_a_data_file_may_compile():
    """Flags, modes, torch's backends and a method of the model are allowed."""
    text = "compile: {backend: eager, fullgraph: true, dynamic: null, target: forward}\n"
    model = Net()
    expected = model(torch.ones(1, 2))
    assert compile_model(model, Config.fromstring(text, ".yaml").compile)
    torch.testing.assert_close(model(torch.ones(1, 2)), expected)
    for mode in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        section = Config.fromstring(f"compile: {{mode: {mode}, backend: inductor}}\n", ".yaml").compile
        assert refused_arguments(torch.compile, section) == {}


def test_a_data_file_may_name_a_registered_backend():
    """A data file may name a backend that the program registered."""
    torch._dynamo.register_backend(lambda graph, inputs: graph.forward, name="of_this_test")
    model = Net()
    compile_model(model, Config.fromstring("compile: {backend: of_this_test}\n", ".yaml").compile)
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_a_python_file_and_the_command_line_may_set_any_option(tmp_path):
    """Options from a program or the command line are not restricted, even if the base is a data file."""
    (tmp_path / "base.yaml").write_text("compile: {options: {cpp.cxx: [./evil.sh]}, backend: eager}\n")
    (tmp_path / "run.py").write_text("_base_ = 'base.yaml'\ncompile = dict(options=dict(_delete_=True, x=1))\n")
    config = Config.fromfile(tmp_path / "run.py")
    assert data_keys(config.compile) == {"backend"}
    config = Config.fromfile(tmp_path / "base.yaml")
    config.merge_from_dict({"compile.options": None})
    assert compile_model(Net(), config.compile)


def test_compile_blocks_follows_the_same_rules():
    """``compile_blocks`` follows the same rules as ``compile``."""
    config = Config.fromstring("blocks: {options: {cpp.cxx: [./evil.sh]}}\n", ".yaml")
    with pytest.raises(ConfigValueError, match="compile_blocks: a data file cannot set 'options'"):
        FSDPOptions(compile_blocks=config.blocks)
    FSDPOptions(compile_blocks=Config.fromstring("blocks: {fullgraph: true}\n", ".yaml").blocks)


def test_a_data_file_cannot_choose_the_rendezvous_address():
    """Ranks send each other pickled objects, so a data file must not choose the rendezvous address."""
    config = Config.fromstring("dist_cfg: {init_method: 'tcp://stranger:29500'}\n", ".yaml")
    with pytest.raises(ConfigValueError, match="dist_cfg: a data file cannot set 'init_method'"):
        set_up_environment({"launcher": "none", "dist_cfg": config.dist_cfg})


# ---- the origin of a value -----------------------------------------------------------------------------------------

KEEPING = {
    "to_dict": lambda config: config.to_dict()["section"],
    "dict": lambda config: dict(config.section),
    "unpacking": lambda config: {**config.section},
    "copy": lambda config: copy.copy(config).section.copy(),
    "deepcopy": lambda config: copy.deepcopy(config).section,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)).section,
    "pickled dict": lambda config: pickle.loads(pickle.dumps(config.to_dict()))["section"],
    "vars": lambda config: vars(config.section),
    "Config of it": lambda config: Config(config).section,
    "Config of a dict": lambda config: Config(config.to_dict()).section,
    "union": lambda config: {"options": 1} | config.section,
    "union of nodes": lambda config: ConfigDict(options=1) | config.section,
    "update": lambda config: _changed(ConfigDict(options=1), lambda node: node.update(config.section)),
    "in-place union": lambda config: _changed(ConfigDict(options=1), lambda node: node.__ior__(config.section)),
    "assignment": lambda config: _changed(ConfigDict(options=1), lambda node: _assign(node, config.section)),
    "merge": lambda config: _changed(ConfigDict(options={}), lambda node: node.merge(config.section)),
    "merge_from_dict": lambda config: _changed(Config({"section": {"options": {}}}), _merging(config)).section,
    "merge of dotted keys": lambda config: _changed(Config({"section": {"options": {}}}), _merging_dotted).section,
    "override beside it": lambda config: _changed(config, lambda it: it.merge_from_dict({"section.x": 1})).section,
}


def _changed(value, change):
    change(value)
    return value


def _assign(node, section):
    for key, value in section.items():
        node[key] = value


def _merging(config):
    return lambda other: other.merge_from_dict(config)


def _merging_dotted(other):
    other.merge_from_dict(Config.fromstring("section.options.evil: true\n", ".yaml"))


@pytest.mark.parametrize("way", KEEPING)
def test_copies_keep_track_of_keys_from_data_files(way):
    """Copies, merges and plain dicts keep track of the arguments that a data file set, not only of strings."""
    section = KEEPING[way](Config.fromstring("section: {options: {evil: true}}\n", ".yaml"))
    assert "options" in data_keys(section)


@pytest.mark.parametrize("dump", [yaml.safe_dump, yaml.dump, json.dumps, repr])
def test_other_libraries_can_serialize_values_from_a_data_file(dump):
    """Keys and names from a data file behave like plain strings in other libraries."""
    section = {"name": {"inner": ["os.path", {"x": 1}]}, "type": "a.b"}
    config = Config.fromstring(f"section: {json.dumps(section)}\n", ".yaml")
    assert dump(config.to_dict()["section"]) == dump(section)


def test_values_set_by_the_program_over_data_are_trusted(tmp_path):
    """A value that replaces one from a data file counts as the program's."""
    (tmp_path / "base.yaml").write_text("section: {a: 1, b: {c: 1}, d: 1}\n")
    (tmp_path / "run.py").write_text("_base_ = 'base.yaml'\nsection = dict(a=2, b=dict(_delete_=True), e=1)\n")
    assert data_keys(Config.fromfile(tmp_path / "run.py").section) == {"d"}


def test_keyword_names_from_data_reach_a_target_as_plain_strings():
    """A target receives plain strings as keyword names, so that it can store them in its state."""
    registry = Registry("thing", scope="test")
    registry.register_module("Keeping", module=lambda **options: options)
    built = registry.build(Config.fromstring("thing: {type: Keeping, rate: 1}\n", ".yaml").thing)
    assert [type(name) for name in built] == [str]


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
def test_yaml_constructs_only_plain_data(value):
    """A YAML tag that constructs an object is rejected with its line."""
    with pytest.raises(ConfigParsingError, match=r"<string>:2 is not valid YAML: the tag"):
        Config.fromstring(f"a: 1\nb: {value}\n", ".yaml")


def test_a_redefined_tag_prefix_is_rejected():
    """A tag that is abbreviated with %TAG is also rejected."""
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
@pytest.mark.slow
def test_an_oversized_file_is_rejected_quickly(name):
    """Excessive nesting, nested aliases and huge numbers are rejected without exhausting memory or time."""
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
def test_a_repeated_key_is_rejected(suffix, text):
    """A repeated key raises an error, because one of its values would be lost silently."""
    with pytest.raises(ConfigParsingError):
        Config.fromstring(text, suffix)


@pytest.mark.parametrize("text", ["- 1\n", "7\n", '"text"\n', "1: x\n", "null: x\n"])
def test_a_data_file_must_contain_a_mapping_with_string_keys(text):
    """A list, a number or a mapping with keys other than strings is not a configuration."""
    with pytest.raises(TypeError):
        Config.fromstring(text, ".yaml")


def test_custom_imports_in_data_are_rejected(tmp_path):
    """A data file cannot request imports, even as the base of a Python file."""
    (tmp_path / "base.yaml").write_text("x: 1\ncustom_imports: {imports: [os]}\n")
    (tmp_path / "run.py").write_text("_base_ = 'base.yaml'\n")
    for name in ("base.yaml", "run.py"):
        with pytest.raises(ConfigParsingError, match=r"base.yaml:2: a data file cannot import modules"):
            Config.fromfile(tmp_path / name)


@pytest.mark.parametrize("value", ["true", "1", "'yes'"])
def test_remote_code_in_data_is_rejected(value):
    """A data file cannot make a library download and run code."""
    with pytest.raises(ConfigParsingError, match="trust_remote_code"):
        Config.fromstring(
            f"model: {{type: transformers.AutoModel.from_pretrained, trust_remote_code: {value}}}\n", ".yaml"
        )


@pytest.mark.parametrize(
    "text",
    [
        "deep: [{list: [{trust_remote_code: true}]}]",
        "trust_remote_code: true",
        "a: {trust_remote_code: '{{ $X:yes }}'}",
    ],
)
def test_remote_code_is_rejected_at_any_depth(text):
    """``trust_remote_code`` is rejected at any depth and from any source."""
    with pytest.raises(ConfigParsingError, match="trust_remote_code"):
        Config.fromstring(f"{text}\n", ".yaml")


@pytest.mark.parametrize("base", ["run.py", "../outside.yaml", "/etc/hosts.yaml", "sub/../../outside.yaml"])
def test_a_data_file_can_only_inherit_from_data_below_its_folder(tmp_path, base):
    """The base of a data file must be a data file in the same folder or below it."""
    folder = tmp_path / "inside"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.yaml").write_text("secret: 1\n")
    (folder / "run.py").write_text("raise SystemExit('ran')\n")
    (folder / "top.yaml").write_text(f"_base_: {base}\n")
    with pytest.raises(ConfigValueError, match=r"is a program that would be executed|is outside"):
        Config.fromfile(folder / "top.yaml")


def test_a_symbolic_link_cannot_leave_the_folder(tmp_path):
    """A symbolic link next to a data file cannot refer to a file outside its folder."""
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "outside.yaml").write_text("secret: 1\n")
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (folder / "top.yaml").write_text("_base_: link.yaml\n")
    with pytest.raises(ConfigValueError, match="is outside"):
        Config.fromfile(folder / "top.yaml")


def test_the_root_limits_where_bases_may_be(tmp_path):
    """With a ``root`` that contains both folders, a data file may inherit from ``../shared``."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text("x: 1\n")
    (tmp_path / "runs" / "run.yaml").write_text("_base_: ../shared/base.yaml\n")
    assert Config.fromfile(tmp_path / "runs" / "run.yaml", root=tmp_path) == {"x": 1}


@pytest.mark.parametrize("key", ["__class__", "__dict__", "__reduce__", "_owner", "to_dict", "__init__"])
def test_keys_cannot_replace_methods(key):
    """A key with the name of a method or an internal attribute remains an ordinary key."""
    config = Config.fromstring(f"x: {{{key}: 1}}\n", ".yaml")
    assert config.x[key] == 1
    assert config.to_dict() == {"x": {key: 1}}
    assert str(config.where("x")) == "<string>:1"


def test_loading_data_imports_nothing(tmp_path):
    """Loading a data file with dotted names imports none of them."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {type: torch.nn.Linear, hook: xmlrpc.client, f: numpy.f2py}\n")
    code = (
        "import sys; from stratagem.config import Config\n"
        f"Config.fromfile({str(path)!r})\n"
        "print([name for name in ('torch', 'numpy', 'xmlrpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_yaml_numbers_are_parsed_as_expected():
    """``1e-3`` is parsed as a number; dates and times are strings."""
    config = Config.fromstring("a: 1e-3\nb: 2026-01-01\nc: 12:30:45\nd: 0x10\ne: .inf\nf: 010\n", ".yaml")
    assert config == {"a": 0.001, "b": "2026-01-01", "c": "12:30:45", "d": 16, "e": float("inf"), "f": 10}


def test_fromdata_reads_only_data(tmp_path, monkeypatch):
    """``fromdata`` rejects programs and does not read environment variables."""
    monkeypatch.setenv("TOKEN", "secret")
    (tmp_path / "run.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ConfigValueError, match="is a program that would be executed"):
        Config.fromdata(tmp_path / "run.py")
    (tmp_path / "run.yaml").write_text("x: 1\nname: '{{ $TOKEN }}'\n")
    with pytest.raises(ConfigValueError, match=r"run.yaml:2: this file must not read environment variables"):
        Config.fromdata(tmp_path / "run.yaml")
    with pytest.raises(ConfigValueError, match="environment variables"):
        Config.fromfile(tmp_path / "run.yaml", use_environment_variables=False)
    (tmp_path / "run.yaml").write_text("x: 1\n")
    assert Config.fromdata(tmp_path / "run.yaml") == {"x": 1}
