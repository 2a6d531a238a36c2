"""A configuration for MMEngine's Runner is rewritten together with its bases."""

from __future__ import annotations

from pathlib import Path

import pytest

from stratagem.config import Config
from stratagem.config.port_files import port_files, verify, write_files
from stratagem.errors import ConfigValueError

RUN = """\
# A short run.
_base_ = ['../_base_/runtime.py', '../_base_/data.json']
train_cfg = dict(max_epochs=2)  # instead of 300
default_hooks = dict(visualization=dict(draw=True), checkpoint=dict(interval=2))
sync_bn = 'torch'
lr = {{_base_.lr}}
optim_wrapper = dict(optimizer=dict(lr=lr / 2))
"""

RUNTIME = """\
_base_ = './common.py'
# Where values are recorded.
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='Visualizer', vis_backends=vis_backends)
find_unused_parameters = True
lr = 0.5
"""

COMMON = """\
default_scope = 'mmengine'
train_cfg = dict(by_epoch=True, max_epochs=300)
default_hooks = dict(visualization=dict(type='VisualizationHook'), checkpoint=dict(type='CheckpointHook', interval=1))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a configuration with two bases, one of which has a base."""
    for name, text in {
        "configs/small/run.py": RUN,
        "configs/_base_/runtime.py": RUNTIME,
        "configs/_base_/common.py": COMMON,
        "configs/_base_/data.json": '{"train_dataloader": {"batch_size": 4}}',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "configs/small/run.py"


def test_bases_are_rewritten_and_keep_their_structure_and_comments(run: Path, tmp_path: Path) -> None:
    """All files are written below the folder, and the result has the original values apart from the rewritten keys."""
    written = write_files(port_files(run), tmp_path / "ported")
    names = sorted(str(path.relative_to(tmp_path / "ported")) for path in written)
    assert names == ["_base_/common.py", "_base_/data.json", "_base_/runtime.py", "small/run.py"]
    assert "# instead of 300" in written[0].read_text()
    assert "# Where values are recorded." in (tmp_path / "ported/_base_/runtime.py").read_text()
    original, new = Config.fromfile(run).to_dict(), Config.fromfile(written[0]).to_dict()
    assert new["trackers"] == ["csv"]
    assert new["strategy"] == {"type": "DDPStrategy", "find_unused_parameters": True, "sync_bn": "torch"}
    assert new["default_hooks"] == {"checkpoint": {"type": "CheckpointHook", "interval": 2}}
    for key in ("train_cfg", "optim_wrapper", "train_dataloader"):
        assert new[key] == original[key]
    assert new["optim_wrapper"]["optimizer"] == {"type": "SGD", "lr": 0.25}
    assert not {"visualizer", "vis_backends", "default_scope", "sync_bn", "find_unused_parameters"} & set(new)
    assert list(verify(run, written[0])) == []


def test_notes_name_the_file_of_a_base(run: Path) -> None:
    """What must be changed by hand in a base has the line of the base, and data files have a note."""
    notes = [note for each in port_files(run) for note in each.ported.notes]
    assert any("runtime.py:4: visualizer was removed" in note for note in notes)
    assert any("data.json is not a Python file" in note for note in notes)


def test_a_value_that_differs_after_rewriting_is_reported(run: Path, tmp_path: Path) -> None:
    """The new configuration is loaded and compared with the original one."""
    written = write_files(port_files(run), tmp_path / "ported")
    written[0].write_text(written[0].read_text().replace("lr / 2", "lr / 4"), encoding="utf-8")
    (note,) = verify(run, written[0])
    assert "optim_wrapper is" in note
    written[0].write_text("_base_ = 'missing.py'", encoding="utf-8")
    (note,) = verify(run, written[0])
    assert "does not load" in note


def test_the_originals_are_not_overwritten(run: Path) -> None:
    """A folder that contains the originals is refused before anything is written."""
    before = run.read_text()
    with pytest.raises(ConfigValueError, match="would overwrite"):
        write_files(port_files(run), run.parent.parent)
    assert run.read_text() == before
