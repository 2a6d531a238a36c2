"""Configurations with the interface of mmengine.config."""

import argparse
import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from stratagem.compat.mmengine.config import Config, ConfigDict, DictAction
from stratagem.compat.mmengine.config.acceptance import require_accepted
from stratagem.compat.mmengine.config.lazy import LazyAttr, LazyObject
from stratagem.errors import ConfigKeyError


def load(folder: Path, text: str, **options: Any) -> Config:
    path = folder / "run.py"
    path.write_text(text)
    return Config.fromfile(path, **options)


def test_values_are_attributes_and_items_of_nested_config_dicts() -> None:
    """A value can be read in both ways; a missing one raises AttributeError or KeyError."""
    cfg = Config({"model": {"stages": [{"width": 8}]}})
    assert cfg.model.stages[0].width == cfg["model"]["stages"][0]["width"] == 8
    assert type(cfg.model.stages[0]) is ConfigDict
    assert not hasattr(cfg, "missing")
    with pytest.raises(KeyError):
        cfg.model["missing"]


def test_pop_of_a_missing_key_returns_none() -> None:
    """As in MMEngine, ``pop`` needs no default."""
    node = ConfigDict(a=1)
    assert (node.pop("a"), node.pop("a"), node.pop("a", 2)) == (1, None, 2)


def test_another_subclass_of_dict_is_kept() -> None:
    """Only plain dicts become ConfigDicts."""

    class Own(dict[str, int]):
        pass

    own = Own(a=1)
    assert ConfigDict(own=own)["own"] is own


def test_a_reserved_key_is_refused() -> None:
    """The four names of attributes cannot be keys."""
    with pytest.raises(KeyError, match="pretty_text"):
        Config({"pretty_text": 1})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cfg: pickle.loads(pickle.dumps(cfg))])
def test_a_copy_is_independent_and_has_the_positions_of_its_files(tmp_path: Path, duplicate: Any) -> None:
    """Deep copies and pickles have equal values, the class of nested dicts and the files."""
    cfg = load(tmp_path, "model = dict(a=dict(b=1))")
    other = duplicate(cfg)
    other.model.a.b = 2
    assert cfg.model.a.b == 1
    assert type(other.model.a) is ConfigDict
    assert (other.filename, other.text, other.where("model")) == (cfg.filename, cfg.text, f"{tmp_path}/run.py:1: ")


def test_options_are_merged_by_dotted_keys_and_list_indices() -> None:
    """Dotted keys select nested values, and numbers select list items."""
    cfg = Config({"pipeline": [{"type": "A", "n": 1}, {"type": "B"}]})
    cfg.merge_from_dict({"pipeline.0.n": 5, "model": {"depth": 3}})
    assert cfg.to_dict() == {"pipeline": [{"type": "A", "n": 5}, {"type": "B"}], "model": {"depth": 3}}
    with pytest.raises(KeyError):
        cfg.merge_from_dict({"pipeline.7.n": 5})


@pytest.mark.parametrize("suffix", [".py", ".json", ".yaml"])
def test_a_dump_loads_with_equal_values(tmp_path: Path, suffix: str) -> None:
    """Each format can be written and read again."""
    cfg = Config({"model": {"type": "Net", "sizes": [1, 2]}, "lr": 0.1})
    assert cfg.dump(tmp_path / f"run{suffix}") is None
    assert Config.fromfile(tmp_path / f"run{suffix}")._cfg_dict == cfg._cfg_dict


def test_placeholders_can_be_kept(tmp_path: Path) -> None:
    """With ``use_predefined_variables=False``, the text of a placeholder is the value."""
    text = "name = '{{ fileBasename }}'\n"
    assert load(tmp_path, text).name == "run.py"
    assert load(tmp_path, text, use_predefined_variables=False).name == "{{ fileBasename }}"


def test_an_imported_name_is_lazy_until_it_is_read(tmp_path: Path) -> None:
    """A pure-Python configuration stores a lazy object, which is imported on access or with ``build``."""
    cfg = load(tmp_path, "import torch.nn as nn\nmodel = dict(type=nn.Linear)\n")
    assert cfg.to_dict() == {"model": {"type": "torch.nn.Linear"}}
    lazy = cfg._to_lazy_dict()["model"]["type"]
    assert isinstance(lazy, LazyObject | LazyAttr)
    assert lazy.build() is cfg.model.type is sys.modules["torch.nn"].Linear
    with pytest.raises(RuntimeError, match=r"dict\(type=torch.nn.Linear"):
        lazy(3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("true", True),
        ("None", None),
        ("resnet", "resnet"),
        ("1,2,x", [1, 2, "x"]),
        ("[1]", [1]),
        ("(1,2)", (1, 2)),
        ("[(a,1),[b]]", [("a", 1), ["b"]]),
        ('"[1, 2]"', [1, 2]),
    ],
)
def test_command_line_options_are_parsed(text: str, value: object) -> None:
    """The action parses numbers, bools, None, lists and tuples."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    found = parser.parse_args(["--cfg-options", f"a.b={text}", "c=x=y"]).cfg_options
    assert found == {"a.b": value, "c": "x=y"}
    assert type(found["a.b"]) is type(value)


def test_a_parser_has_an_option_for_each_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto_argparser`` reads the file on the command line and adds options with its types."""
    (tmp_path / "run.py").write_text("lr = 0.1\nmodel = dict(depth=3, names=['a'])\nflag = False\n")
    command = [
        "train.py",
        f"{tmp_path}/run.py",
        "--lr",
        "0.5",
        "--model.depth",
        "4",
        "--model.names",
        "b",
        "c",
        "--flag",
    ]
    monkeypatch.setattr(sys, "argv", command)
    parser, cfg = Config.auto_argparser()
    found = vars(parser.parse_args())
    assert (found["lr"], found["model.depth"], found["model.names"], found["flag"]) == (0.5, 4, ["b", "c"], True)
    assert cfg.lr == 0.1


RUN = "default_scope = 'mmpretrain'\nmodel = dict(type='Net')\n"


def test_the_keys_of_mmengine_and_variables_are_accepted(tmp_path: Path) -> None:
    """Sections that only MMEngine has, and variables that the file uses, are accepted without a warning."""
    require_accepted(load(tmp_path, RUN + "vis_backends = []\nvisualizer = dict(b=vis_backends)\nsync_bn = 'torch'\n"))


@pytest.mark.parametrize("scope", ["mmpretrain", "mmengine"])
def test_a_typo_is_refused_with_its_line(tmp_path: Path, scope: str) -> None:
    """A name that resembles a key is refused under every scope, and all of them are listed."""
    cfg = load(tmp_path, f"default_scope = {scope!r}\nmodel = 1\noptim_wraper = 2\nvisualiser = optim_wraper\n")
    with pytest.raises(
        ConfigKeyError, match=r"has 2 unknown keys:\n.*run.py:3: .*'optim_wraper'(.|\n)*run.py:4: .*'visualiser'"
    ):
        require_accepted(cfg)


def test_a_key_of_mmcv_warns_with_its_replacement(tmp_path: Path) -> None:
    """A key of MMCV 1 has no effect, and the warning states what to write."""
    with pytest.warns(UserWarning, match=r"run.py:3: lr_config is a key of MMCV 1.*Write param_scheduler=\["):
        require_accepted(load(tmp_path, RUN + "lr_config = dict(policy='step')\n"))


def test_a_key_that_the_program_sets_is_accepted_unless_it_is_a_typo(tmp_path: Path) -> None:
    """Scripts store values of their own in the configuration."""
    cfg = load(tmp_path, RUN)
    cfg.my_number = 3
    require_accepted(cfg)
    cfg.work_dirs = "x"
    with pytest.raises(ConfigKeyError, match="Did you mean 'work_dir'"):
        require_accepted(cfg)


def test_an_option_that_changes_a_used_variable_warns_with_both_places(tmp_path: Path) -> None:
    """``--cfg-options`` changes a variable after the file used it."""
    cfg = load(tmp_path, RUN + "root = 'a'\ntrain_dataloader = dict(root=root)\n")
    cfg.merge_from_dict({"root": "b"})
    with pytest.warns(UserWarning, match=r"'root' is set in --cfg-options root, but .*run.py:4 uses its value before"):
        require_accepted(cfg)
