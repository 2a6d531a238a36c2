"""A configuration for MMEngine's Runner is rewritten for this package."""

from pathlib import Path

import pytest

from stratagem.config import Config
from stratagem.config.port import port
from stratagem.errors import ConfigParsingError

MMENGINE = """\
# The runtime of a small run.
default_scope = 'mmengine'
default_hooks = dict(
    timer=dict(type='IterTimerHook'),  # times
    # Ü: log lines
    logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    visualization=dict(type='VisualizationHook'),
)
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]  # where
visualizer = dict(type='Visualizer', vis_backends=vis_backends)
log_processor = dict(type='LogProcessor', window_size=20, by_epoch=True)
find_unused_parameters = True
sync_bn = 'torch'  # for small batches
work_dir = '{{ fileDirname }}/out'
lr = 0.1
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=lr))
"""

STRATAGEM = """\
# The runtime of a small run.
# Not used: types are looked up here by default.
# default_scope = 'mmengine'
default_hooks = dict(
    timer=dict(type='IterTimerHook'),  # times
    # Ü: log lines
    logger=dict(type='LoggerHook', interval=10, window_size=20),
)
trackers = ['csv', 'tensorboard']  # where
# Not used: the trackers record the values; nothing draws samples.
# visualizer = dict(type='Visualizer', vis_backends=vis_backends)
# Not used: default_hooks.logger has window_size, and lines are by iteration.
# log_processor = dict(type='LogProcessor', window_size=20, by_epoch=True)
strategy = dict(type="DDPStrategy", find_unused_parameters=True, sync_bn='torch')
# Not used: an argument of strategy.
# sync_bn = 'torch'  # for small batches
work_dir = '{{ fileDirname }}/out'
lr = 0.1
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=lr))
"""


def test_keys_are_rewritten_and_comments_stay() -> None:
    """The sections that both engines read differently are rewritten; everything else is unchanged."""
    assert port(MMENGINE, "run.py").text == STRATAGEM


def test_the_result_loads_with_the_new_sections(tmp_path: Path) -> None:
    """The rewritten file is a configuration with trackers and a strategy."""
    (tmp_path / "run.py").write_text(port(MMENGINE, "run.py").text, encoding="utf-8")
    config = Config.fromfile(tmp_path / "run.py")
    assert config.trackers == ["csv", "tensorboard"]
    assert config.strategy == {"type": "DDPStrategy", "find_unused_parameters": True, "sync_bn": "torch"}
    assert config.default_hooks.logger == {"type": "LoggerHook", "interval": 10, "window_size": 20}
    assert "visualizer" not in config


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("lr_config = dict(policy='step')", "run.py:1: 'lr_config' is a key of MMCV 1. Write param_scheduler=["),
        (
            "custom_hooks = [\n    dict(type='EmptyCacheHook')]",
            "run.py:2: EmptyCacheHook has no counterpart: remove it",
        ),
        ("vis_backends = [dict(type='AimVisBackend')]", "run.py:1: dict(type='AimVisBackend') has no counterpart"),
        ("tta_model = dict(type='TTA')", "run.py:1: tta_model was removed: test-time augmentation needs"),
    ],
)
def test_what_must_be_changed_by_hand_is_noted(text: str, note: str) -> None:
    """Each key without a counterpart has a note with its line and the advice."""
    (found,) = port(text, "run.py").notes
    assert found.startswith(note)


def test_an_invalid_file_is_an_error_with_its_line() -> None:
    """A syntax error is reported with its line."""
    with pytest.raises(ConfigParsingError, match="run.py:2 is not valid Python"):
        port("a = 1\nb = (", "run.py")
