import subprocess
import sys
import warnings
from collections.abc import Mapping

import pytest

from stratagem.config import Config
from stratagem.errors import (
    ConfigFileError,
    ConfigKeyError,
    ConfigParsingError,
    ConfigTypeError,
    MissingDependencyError,
)


@pytest.fixture
def write(tmp_path):
    """Write files below tmp_path and return the path of the last one."""

    def write_files(**files):
        for name, text in files.items():
            stem, _, suffix = name.rpartition("_")
            path = tmp_path / f"{stem}.{suffix}"
            path.write_text(text)
        return path

    return write_files


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("py", "model = dict(type='Net', depth=3)\nlr = 0.1\n"),
        ("yaml", "model: {type: Net, depth: 3}\nlr: 0.1\n"),
        ("yml", "model:\n  type: Net\n  depth: 3\nlr: 1e-1\n"),
        ("json", '{"model": {"type": "Net", "depth": 3}, "lr": 0.1}'),
        ("toml", "lr = 0.1\n[model]\ntype = 'Net'\ndepth = 3\n"),
    ],
)
def test_every_language_says_the_same(tmp_path, suffix, text):
    """A Python, YAML, JSON or TOML file with the same content gives the same configuration."""
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    config = Config.fromfile(path)
    assert config.to_dict() == {"model": {"type": "Net", "depth": 3}, "lr": 0.1}
    assert config.filename == str(path)


def test_a_child_is_laid_over_its_base(write):
    """Dicts merge key by key; other values and lists are replaced as a whole."""
    path = write(
        base_py="model = dict(type='Net', depth=3, stages=[1, 2])\nlr = 0.1\n",
        run_py="_base_ = 'base.py'\nmodel = dict(depth=5, stages=[7])\n",
    )
    assert Config.fromfile(path) == {"model": {"type": "Net", "depth": 5, "stages": [7]}, "lr": 0.1}


def test_delete_replaces_a_dict(write):
    """With ``_delete_=True`` nothing of the base's dict is left, and the mark is gone."""
    path = write(base_py="model = dict(a=1, b=2)", run_py="_base_ = ['base.py']\nmodel = dict(_delete_=True, c=3)\n")
    assert Config.fromfile(path) == {"model": {"c": 3}}


def test_a_dict_on_something_else_is_refused(write):
    """A dict cannot be merged into a number; the error names the key, the value and the way out."""
    path = write(base_py="model = 3", run_py="_base_ = 'base.py'\nmodel = dict(a=1)\n")
    with pytest.raises(ConfigTypeError, match=r"run.py: model is a dict here and a int \(3\).*_delete_=True"):
        Config.fromfile(path)


def test_two_bases_with_one_key_name_both_places(write):
    """A key that two bases give is an error with both files and lines."""
    path = write(a_py="x = 1\nlr = 0.1\n", b_yaml="lr: 0.2\n", run_py="_base_ = ['a.py', 'b.yaml']\n")
    with pytest.raises(KeyError, match=r"two bases give the key 'lr': .*a.py:2 and .*b.yaml:1"):
        Config.fromfile(path)


def test_bases_in_a_circle_are_refused(write):
    """Files that are based on each other are named in their order."""
    path = write(a_py="_base_ = 'b.py'", b_py="_base_ = 'a.py'")
    with pytest.raises(ConfigParsingError, match=r"circle: .*b.py -> .*a.py -> .*b.py"):
        Config.fromfile(path)


def test_a_missing_base_says_whose_base_it_is(write):
    """The error about a missing base names the file that asked for it."""
    with pytest.raises(ConfigFileError, match=r"none.py cannot be read.*base of .*run.py"):
        Config.fromfile(write(run_py="_base_ = 'none.py'"))


@pytest.mark.parametrize("name", ["run.txt", "run"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    """Only Python, YAML, JSON and TOML are configurations; anything else is an OSError."""
    path = tmp_path / name
    path.write_text("")
    with pytest.raises(OSError, match="A configuration is one of"):
        Config.fromfile(path)


@pytest.mark.parametrize(
    ("suffix", "text", "line"),
    [
        ("py", "a = 1\nb = (\n", 2),
        ("yaml", "a: 1\nb: [\n", 3),
        ("json", '{"a": 1,\n"b": }', 2),
        ("py", "a = 1\nb = c\n", 2),
    ],
)
def test_an_invalid_text_is_refused_with_its_line(tmp_path, suffix, text, line):
    """A text that cannot be read, or that fails, is an error with file and line."""
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    with pytest.raises(ConfigParsingError, match=rf"run.{suffix}:{line} "):
        Config.fromfile(path)


def test_helpers_of_a_python_file_are_no_keys(write):
    """Modules, imported names, functions, classes and names with an underscore are not keys."""
    path = write(
        run_py="import os\nfrom math import pi\n_width = 4\ndef double(x): return 2 * x\nclass A: pass\n"
        "model = dict(width=double(_width), turn=pi > 3)\n"
    )
    assert Config.fromfile(path) == {"model": {"width": 8, "turn": True}}


def test_a_standard_library_import_is_no_lazy_import(write):
    """``from functools import partial`` runs as written, in any environment."""
    path = write(run_py="from functools import partial\nmake = partial(int, base=2)\nx = make('11')\n")
    assert Config.fromfile(path)["x"] == 3


def test_a_config_is_a_mapping():
    """A Config has the interface of a mapping and equals the dict that it stands for."""
    config = Config({"a": 1, "b": {"c": 2}})
    assert isinstance(config, Mapping)
    assert list(config) == ["a", "b"]
    assert config.get("x", 5) == 5
    assert config.b.c == 2
    assert {**config} == {"a": 1, "b": {"c": 2}}


def test_a_config_is_made_from_a_mapping_only():
    """Anything but a mapping is a TypeError."""
    with pytest.raises(TypeError, match="made from a mapping, not from list"):
        Config([("a", 1)])


@pytest.mark.parametrize("key", ["filename", "text", "pretty_text", "env_variables", "dump"])
def test_a_key_that_an_attribute_would_hide_is_refused(key):
    """Names of Config's own attributes cannot be keys."""
    with pytest.raises(KeyError, match=key):
        Config({key: 1})
    with pytest.raises(KeyError, match=key):
        Config()[key] = 1
    with pytest.raises(KeyError, match=rf"<string>:1\).*{key}"):
        Config.fromstring(f"{key} = 1", ".py")


def test_custom_imports_finds_modules_beside_the_file(write, monkeypatch):
    """A module beside the configuration is imported, and its folder stays importable for worker processes."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(
        beside_model_py="VALUE = 3\n",
        run_py="custom_imports = dict(imports=['beside_model'], allow_failed_imports=False)\n",
    )
    Config.fromfile(path)
    assert sys.modules.pop("beside_model").VALUE == 3
    assert str(path.parent) in sys.path


def test_a_custom_import_that_fails_is_an_import_error(write, monkeypatch):
    """A module that cannot be imported stops the loading, or only warns where that was asked for."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(run_py="custom_imports = dict(imports='no_such_module_here')\n")
    with pytest.raises(MissingDependencyError, match=r"no_such_module_here.*Searched: "):
        Config.fromfile(path)
    path = write(run_py="custom_imports = dict(imports='no_such_module_here', allow_failed_imports=True)\n")
    with pytest.warns(UserWarning, match="no_such_module_here"):
        Config.fromfile(path)


def test_custom_imports_refuses_unknown_keys(write):
    """A misspelled key of custom_imports is refused with the right one."""
    with pytest.raises(ConfigKeyError, match="Did you mean 'imports'"):
        Config.fromfile(write(run_py="custom_imports = dict(import_=['x'])\n"))


def test_a_deprecated_file_warns(write):
    """A file that says what replaced it warns, and the notice is no key."""
    path = write(old_py="_deprecation_ = dict(expected='new.py', reference='the notes')\nx = 1\n")
    with pytest.warns(DeprecationWarning, match=r"old.py is deprecated; use new.py. See the notes."):
        assert Config.fromfile(path) == {"x": 1}


def test_a_base_in_a_package_brings_its_scope(tmp_path, monkeypatch):
    """``package::file`` is found in the installed package, and what it builds is looked up there first."""
    configs = tmp_path / "somelib" / "configs"
    configs.mkdir(parents=True)
    (tmp_path / "somelib" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (configs / "net.py").write_text("model = dict(type='Net', neck=[dict(type='Neck')], init=dict(a=1))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config.fromstring("_base_ = 'somelib::net.py'", ".py")
    assert config.model == {
        "type": "Net",
        "neck": [{"type": "Neck", "_scope_": "somelib"}],
        "init": {"a": 1},
        "_scope_": "somelib",
    }


def test_loading_needs_neither_torch_nor_yaml():
    """Importing the configuration and the registries loads nothing heavy."""
    code = (
        "import sys, stratagem.config, stratagem.registry\n"
        "print([name for name in ('torch', 'numpy', 'yaml', 'tomllib') if name in sys.modules])"
    )
    with warnings.catch_warnings():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
