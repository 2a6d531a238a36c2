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
    """Write files to tmp_path and return the path of the last one."""

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
def test_all_languages_give_the_same_configuration(tmp_path, suffix, text):
    """Python, YAML, JSON and TOML files with the same content load as the same configuration."""
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    config = Config.fromfile(path)
    assert config.to_dict() == {"model": {"type": "Net", "depth": 3}, "lr": 0.1}
    assert config.filename == str(path)


def test_a_child_is_merged_over_its_base(write):
    """Dicts are merged key by key; other values, including lists, are replaced."""
    path = write(
        base_py="model = dict(type='Net', depth=3, stages=[1, 2])\nlr = 0.1\n",
        run_py="_base_ = 'base.py'\nmodel = dict(depth=5, stages=[7])\n",
    )
    assert Config.fromfile(path) == {"model": {"type": "Net", "depth": 5, "stages": [7]}, "lr": 0.1}


def test_delete_replaces_a_dict(write):
    """``_delete_=True`` discards the base's dict and does not appear in the result."""
    path = write(base_py="model = dict(a=1, b=2)", run_py="_base_ = ['base.py']\nmodel = dict(_delete_=True, c=3)\n")
    assert Config.fromfile(path) == {"model": {"c": 3}}


def test_merging_a_dict_into_another_type_is_an_error(write):
    """Merging a dict into a number raises an error that names the key, the value and the fix."""
    path = write(base_py="model = 3", run_py="_base_ = 'base.py'\nmodel = dict(a=1)\n")
    with pytest.raises(ConfigTypeError, match=r"run.py: model is a dict here, but a int \(3\).*_delete_=True"):
        Config.fromfile(path)


def test_a_key_in_two_bases_is_an_error(write):
    """A key that two bases define raises an error that names both files and lines."""
    path = write(a_py="x = 1\nlr = 0.1\n", b_yaml="lr: 0.2\n", run_py="_base_ = ['a.py', 'b.yaml']\n")
    with pytest.raises(KeyError, match=r"two bases set the key 'lr': .*a.py:2 and .*b.yaml:1"):
        Config.fromfile(path)


def test_circular_bases_are_an_error(write):
    """The error for circular bases lists the files in order."""
    path = write(a_py="_base_ = 'b.py'", b_py="_base_ = 'a.py'")
    with pytest.raises(ConfigParsingError, match=r"cycle: .*b.py -> .*a.py -> .*b.py"):
        Config.fromfile(path)


def test_the_error_for_a_missing_base_names_the_child(write):
    """The error for a missing base names the file that refers to it."""
    with pytest.raises(ConfigFileError, match=r"none.py cannot be read.*base of .*run.py"):
        Config.fromfile(write(run_py="_base_ = 'none.py'"))


@pytest.mark.parametrize("name", ["run.txt", "run"])
def test_an_unsupported_file_type_is_an_error(tmp_path, name):
    """A file that is not Python, YAML, JSON or TOML raises an OSError."""
    path = tmp_path / name
    path.write_text("")
    with pytest.raises(OSError, match="Supported suffixes"):
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
def test_an_invalid_file_is_an_error_with_its_line(tmp_path, suffix, text, line):
    """A file that cannot be parsed or executed raises an error with the file and line."""
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    with pytest.raises(ConfigParsingError, match=rf"run.{suffix}:{line} "):
        Config.fromfile(path)


def test_helpers_in_a_python_file_do_not_become_keys(write):
    """Modules, imported names, functions, classes and names with two leading underscores do not become keys."""
    path = write(
        run_py="import os\nfrom math import pi\n__width = 4\ndef double(x): return 2 * x\nclass A: pass\n"
        "model = dict(width=double(__width), turn=pi > 3)\n"
    )
    assert Config.fromfile(path) == {"model": {"width": 8, "turn": True}}


def test_a_standard_library_import_is_not_lazy(write):
    """A standard library import such as ``from functools import partial`` is executed, not lazy."""
    path = write(run_py="from functools import partial\nmake = partial(int, base=2)\nx = make('11')\n")
    assert Config.fromfile(path)["x"] == 3


def test_a_config_is_a_mapping():
    """A Config implements the mapping interface and compares equal to a dict with the same content."""
    config = Config({"a": 1, "b": {"c": 2}})
    assert isinstance(config, Mapping)
    assert list(config) == ["a", "b"]
    assert config.get("x", 5) == 5
    assert config.b.c == 2
    assert {**config} == {"a": 1, "b": {"c": 2}}


def test_a_config_requires_a_mapping():
    """A Config made from anything but a mapping raises a TypeError."""
    with pytest.raises(TypeError, match="expects a mapping, got list"):
        Config([("a", 1)])


@pytest.mark.parametrize("key", ["filename", "text", "pretty_text", "env_variables", "dump"])
def test_attribute_names_of_config_are_rejected_as_keys(key):
    """The attribute names of Config are rejected as keys."""
    with pytest.raises(KeyError, match=key):
        Config({key: 1})
    with pytest.raises(KeyError, match=key):
        Config()[key] = 1
    with pytest.raises(KeyError, match=rf"<string>:1\).*{key}"):
        Config.fromstring(f"{key} = 1", ".py")


def test_custom_imports_finds_modules_next_to_the_file(write, monkeypatch):
    """A module next to the configuration is imported, and its folder stays on sys.path for worker processes."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(
        beside_model_py="VALUE = 3\n",
        run_py="custom_imports = dict(imports=['beside_model'], allow_failed_imports=False)\n",
    )
    Config.fromfile(path)
    assert sys.modules.pop("beside_model").VALUE == 3
    assert str(path.parent) in sys.path


def test_a_failed_custom_import_is_an_import_error(write, monkeypatch):
    """A failed custom import raises an error, or a warning with ``allow_failed_imports=True``."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write(run_py="custom_imports = dict(imports='no_such_module_here')\n")
    with pytest.raises(MissingDependencyError, match=r"no_such_module_here.*Searched: "):
        Config.fromfile(path)
    path = write(run_py="custom_imports = dict(imports='no_such_module_here', allow_failed_imports=True)\n")
    with pytest.warns(UserWarning, match="no_such_module_here"):
        Config.fromfile(path)


def test_a_module_that_fails_to_import_shows_the_cause_instead_of_the_searched_folders(write, monkeypatch):
    """The searched folders are listed only if the module itself was not found; otherwise the first cause is shown."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    lines = (
        "try:\n    raise RuntimeError('no operator nms')\n"
        "except RuntimeError as error:\n    raise ModuleNotFoundError('Cannot import Bert.') from error\n"
    )
    path = write(lazy_bert_py=lines, run_py="custom_imports = dict(imports='lazy_bert')\n")
    with pytest.raises(MissingDependencyError, match=r"Bert\. The cause is RuntimeError: no operator nms$"):
        Config.fromfile(path)
    path = write(old_names_py="from sys import no_such_name\n", run_py="custom_imports = dict(imports='old_names')\n")
    with pytest.raises(MissingDependencyError, match=r"no_such_name.*\.$") as caught:
        Config.fromfile(path)
    assert "Searched" not in str(caught.value)


def test_custom_imports_rejects_unknown_keys(write):
    """A misspelled key of custom_imports is rejected with the correct name."""
    with pytest.raises(ConfigKeyError, match="Did you mean 'imports'"):
        Config.fromfile(write(run_py="custom_imports = dict(import_=['x'])\n"))


def test_a_deprecated_file_warns(write):
    """A file with a ``_deprecation_`` notice warns, and the notice does not become a key."""
    path = write(old_py="_deprecation_ = dict(expected='new.py', reference='the notes')\nx = 1\n")
    with pytest.warns(DeprecationWarning, match=r"old.py is deprecated; use new.py. See the notes."):
        assert Config.fromfile(path) == {"x": 1}


def test_a_base_in_a_package_sets_its_scope(tmp_path, monkeypatch):
    """``package::file`` is read from the installed package, and its types are looked up in that scope first."""
    configs = tmp_path / "somelib" / "configs"
    configs.mkdir(parents=True)
    (tmp_path / "somelib" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (configs / "net.py").write_text("model = dict(type='Net', neck=[dict(type='Neck')], init=dict(a=1))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config.fromstring("_base_ = 'somelib::net.py'", ".py")
    assert config.model == {
        "type": "Net",
        "neck": [{"type": "Neck"}],
        "init": {"a": 1},
        "_scope_": "somelib",
    }


@pytest.mark.slow
def test_importing_config_is_lightweight():
    """Importing the configuration and the registries does not import torch, NumPy or file parsers."""
    code = (
        "import sys, stratagem.config, stratagem.registry\n"
        "print([name for name in ('torch', 'numpy', 'yaml', 'tomllib') if name in sys.modules])"
    )
    with warnings.catch_warnings():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
