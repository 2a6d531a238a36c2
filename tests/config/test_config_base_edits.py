"""In-place edits of ``_base_`` in a Python configuration. The expected values are those that MMEngine 0.10.7 loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stratagem import Config
from stratagem.config import explain
from stratagem.errors import ConfigKeyError

BASE = """
model = dict(type='Net', depth=3, stages=[dict(width=8), dict(width=16)])
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
param_scheduler = [dict(type='LinearLR', end=5), dict(type='MultiStepLR', milestones=[8, 11])]
lr = 1
"""
GIVEN: dict[str, Any] = {
    "model": {"type": "Net", "depth": 3, "stages": [{"width": 8}, {"width": 16}]},
    "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1}},
    "param_scheduler": [{"type": "LinearLR", "end": 5}, {"type": "MultiStepLR", "milestones": [8, 11]}],
    "lr": 1,
}

# The text after `_base_ = 'base.py'`, and the keys that differ from the base; the value "gone" marks deleted keys.
EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "attribute": (
        "_base_.optim_wrapper.type = 'AmpOptimWrapper'",
        {"optim_wrapper": {"type": "AmpOptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1}}},
    ),
    "item": ("_base_['model']['depth'] = 5", {"model": {**GIVEN["model"], "depth": 5}}),
    "inside of a list": (
        "_base_.param_scheduler[1].milestones = [16, 22]",
        {"param_scheduler": [{"type": "LinearLR", "end": 5}, {"type": "MultiStepLR", "milestones": [16, 22]}]},
    ),
    "augmented": ("_base_.model.depth += 1\n_base_.lr *= 2", {"model": {**GIVEN["model"], "depth": 4}, "lr": 2}),
    "key of a dict deleted": (
        "del _base_.model.depth",
        {"model": {"type": "Net", "stages": [{"width": 8}, {"width": 16}]}},
    ),
    "top-level key deleted": ("del _base_.model", {"model": "gone"}),
    "top-level key popped": ("_base_.pop('model')", {"model": "gone"}),
    "deleted, then given": ("del _base_.model\nmodel = dict(type='Other')", {"model": {"type": "Other"}}),
    "new key": ("_base_.extra = 3", {"extra": 3}),
    "list appended to": (
        "_base_.param_scheduler.append(dict(type='ConstantLR'))",
        {"param_scheduler": [*GIVEN["param_scheduler"], {"type": "ConstantLR"}]},
    ),
    "list cut": ("del _base_.param_scheduler[0]", {"param_scheduler": GIVEN["param_scheduler"][1:]}),
    "slice assigned": (
        "_base_.param_scheduler[1].milestones[:1] = [1, 2]",
        {"param_scheduler": [{"type": "LinearLR", "end": 5}, {"type": "MultiStepLR", "milestones": [1, 2, 11]}]},
    ),
    "inserted": (
        "_base_.model.stages.insert(0, dict(width=4))",
        {"model": {**GIVEN["model"], "stages": [{"width": 4}, {"width": 8}, {"width": 16}]}},
    ),
    "updated, key by key": (
        "_base_.update(dict(optim_wrapper=dict(optimizer=dict(lr=0.5))))",
        {"optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.5}}},
    ),
    "set by default": ("_base_.model.setdefault('width', 7)", {"model": {**GIVEN["model"], "width": 7}}),
    "through an alias": (
        "__m = _base_.model\n__m.stages[0].width = 9",
        {"model": {**GIVEN["model"], "stages": [{"width": 9}, {"width": 16}]}},
    ),
    "through a public alias": (
        "head = _base_.model\nhead.depth = 9",
        {"model": {**GIVEN["model"], "depth": 9}, "head": {**GIVEN["model"], "depth": 9}},
    ),
    "in a loop": (
        "for _s in _base_.model.stages:\n    _s.width *= 2\ndel _s",
        {"model": {**GIVEN["model"], "stages": [{"width": 16}, {"width": 32}]}},
    ),
    "in a function": (
        "def _deepen(cfg):\n    cfg.model.depth = 101\n_deepen(_base_)",
        {"model": {**GIVEN["model"], "depth": 101}},
    ),
    "and the file gives the same": (
        "_base_.model.depth = 5\nmodel = dict(width=2)",
        {"model": {**GIVEN["model"], "depth": 5, "width": 2}},
    ),
    "and the file replaces it": (
        "_base_.model.depth = 5\nmodel = dict(_delete_=True, type='Other')",
        {"model": {"type": "Other"}},
    ),
    "a placeholder before the edit": ("x = {{_base_.lr}}\n_base_.lr = 5", {"x": 5, "lr": 5}),
    "a value read before the edit": ("x = _base_.lr\n_base_.lr = 5", {"x": 1, "lr": 5}),
    "an equal number of another type": (
        "_base_.param_scheduler[1].milestones[0] = 8.0",
        {"param_scheduler": [{"type": "LinearLR", "end": 5}, {"type": "MultiStepLR", "milestones": [8.0, 11]}]},
    ),
    "read alone": ("x = _base_.model.get('width', 1)\ny = 'lr' in _base_", {"x": 1, "y": True}),
}


def load(folder: Path, text: str, base: str = BASE) -> Config:
    (folder / "base.py").write_text(base)
    (folder / "run.py").write_text(f"_base_ = 'base.py'\n{text}\n")
    return Config.fromfile(folder / "run.py")


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_the_base_changes_what_is_loaded(tmp_path: Path, name: str) -> None:
    """Every kind of in-place edit of ``_base_`` takes effect, as in MMEngine."""
    text, changes = EDITS[name]
    expected = {key: value for key, value in {**GIVEN, **changes}.items() if value != "gone"}
    loaded = load(tmp_path, text).to_dict()
    assert loaded == expected
    assert repr(loaded["param_scheduler"]) == repr(expected["param_scheduler"])


def test_a_base_can_edit_its_own_base(tmp_path: Path) -> None:
    """The edits of a file apply to its children, which may edit the values again."""
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "middle.py").write_text("_base_ = 'base.py'\n_base_.model.depth = 5\ndel _base_.lr\n")
    (tmp_path / "run.py").write_text("_base_ = 'middle.py'\n_base_.model.depth += 1\n")
    expected = {**GIVEN, "model": {**GIVEN["model"], "depth": 6}}
    del expected["lr"]
    assert Config.fromfile(tmp_path / "run.py").to_dict() == expected


def test_an_edit_affects_only_the_file_that_makes_it(tmp_path: Path) -> None:
    """An edit affects neither the base nor other files with the same base."""
    load(tmp_path, "_base_.model.depth = 5")
    (tmp_path / "other.py").write_text("_base_ = 'base.py'\n")
    assert Config.fromfile(tmp_path / "other.py").to_dict() == GIVEN
    assert Config.fromfile(tmp_path / "base.py").to_dict() == GIVEN


@pytest.mark.parametrize(
    ("edit", "path"),
    [
        ("_base_.model.depth = 5", "model.depth"),
        ("_base_.model.depth += 2", "model.depth"),
        ("_base_.model.stages.append(dict(width=4))", "model.stages"),
        ("del _base_.model.stages[0]", "model.stages"),
    ],
)
def test_explain_names_the_line_of_an_edit(tmp_path: Path, edit: str, path: str) -> None:
    """``explain`` lists the line of the edit after the line of the base."""
    lines = explain(load(tmp_path, f"\n{edit}"), path).splitlines()
    assert [Path(line.split()[0]).name for line in lines[1:]] == ["base.py:2", "run.py:3"]


def test_a_shared_base_is_not_a_conflict(tmp_path: Path) -> None:
    """Two bases may share a base without a conflict."""
    (tmp_path / "base.py").write_text("lr = 1\nmodel = dict(depth=3)\n")
    (tmp_path / "a.py").write_text("_base_ = 'base.py'\na = 1\n")
    (tmp_path / "b.py").write_text("_base_ = 'base.py'\nb = 2\n")
    (tmp_path / "run.py").write_text("_base_ = ['a.py', 'b.py', 'base.py']\nmodel = dict(width=8)\n")
    expected = {"lr": 1, "model": {"depth": 3, "width": 8}, "a": 1, "b": 2}
    assert Config.fromfile(tmp_path / "run.py").to_dict() == expected


@pytest.mark.parametrize("change", ["lr = 2", "_base_.lr = 2", "del _base_.lr\nlr = 2"])
def test_a_shared_base_with_a_changed_value_is_a_conflict(tmp_path: Path, change: str) -> None:
    """A shared base whose value one base changes is a conflict, because the result depends on the order."""
    (tmp_path / "base.py").write_text("lr = 1\n")
    (tmp_path / "a.py").write_text(f"_base_ = 'base.py'\n{change}\n")
    (tmp_path / "b.py").write_text("_base_ = 'base.py'\nb = 2\n")
    (tmp_path / "run.py").write_text("_base_ = ['a.py', 'b.py']\n")
    with pytest.raises(ConfigKeyError, match="two bases set the key 'lr'"):
        Config.fromfile(tmp_path / "run.py")
