"""All commands print names from files without control characters."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import save_checkpoint
from stratagem.logging import Logger
from stratagem.utils.printable import escape_controls, printable_name

pytestmark = pytest.mark.slow

Command = Callable[..., Any]
# Changes the color, sets the title of the window, moves the cursor, overwrites the line, reverses the direction.
EVIL = "e\x1b[31mv\x1b]0;title\x07\x9b1A\r\u202el\u200b\n"


def controls_in(text: str) -> set[str]:
    """Return the control characters in a text, except line feeds."""
    return {each for each in text if not each.isprintable() and each != "\n"}


def checkpoint(path: Path, **state: Any) -> Path:
    """Save a checkpoint whose names and values contain control characters."""
    tree = {
        "state_dict": {EVIL: torch.ones(1), **state},
        "hooks": {EVIL: {EVIL: torch.zeros(1), "text": EVIL}},
        "meta": {
            "epoch": 1,
            "iter": 1,
            EVIL: EVIL,
            "run_id": EVIL,
            "experiment_name": EVIL,
            "cfg": f"a = {EVIL!r}\n# {EVIL}",
            "lineage": [
                {
                    "name": EVIL,
                    "epoch": 0,
                    "iter": 0,
                    "checkpoint": EVIL,
                    "changes": [EVIL],
                    "strategy": EVIL,
                    "world_size": 1,
                }
            ],
        },
    }
    save_checkpoint(tree, path)
    return path


def run_of(config: str, tmp_path: Path, changes: Mapping[str, Any]) -> Path:
    """Write a data file that is based on the configuration."""
    file = tmp_path / "evil.json"
    file.write_text(json.dumps({"model": {"type": "Linear", "in_features": 1, "out_features": 1}, **changes}))
    return file


@pytest.mark.parametrize("name", ["c", "c.pth"])
@pytest.mark.parametrize(
    "words",
    [("show",), ("show", "--tensors"), ("show", "--config"), ("verify",), ("ls",), ("diff",)],
    ids=" ".join,
)
def test_commands_on_checkpoints_escape_names(
    stratagem: Command, tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    """Names of tensors, parts and keys, and values of the meta, are printed without control characters."""
    first = checkpoint(tmp_path / f"{EVIL[:6]}-{name}")
    second = checkpoint(tmp_path / f"other-{name}", more=torch.ones(1), **{f"{EVIL}2": torch.ones(1)})
    paths = [tmp_path] if words[0] == "ls" else [first, second] if words[0] == "diff" else [first]
    outcome = stratagem("ckpt", *words, *paths)
    assert outcome.status in (0, 1), outcome.err
    assert outcome.out
    assert controls_in(outcome.out + outcome.err) == set()
    if words in (("show", "--tensors"), ("diff",)):
        assert "e\\x1b[31mv" in outcome.out.replace("\n", "")


def test_the_sessions_of_a_checkpoint_are_escaped(stratagem: Command, tmp_path: Path) -> None:
    """Names in the history of a run are printed without control characters."""
    outcome = stratagem("runs", "show", checkpoint(tmp_path / "c"))
    assert outcome.status == 0, outcome.err
    assert controls_in(outcome.out + outcome.err) == set()


@pytest.mark.parametrize(
    "changes",
    [
        {EVIL: 1},
        {"model": {"type": EVIL}},
        {"model": {"type": "Linear", EVIL: 1, "in_features": 1, "out_features": 1}},
        {"train_cfg": {EVIL: EVIL}},
        {"custom_hooks": [{"type": EVIL}]},
        {"work_dir": EVIL, "load_from": EVIL},
    ],
    ids=["key", "type", "argument", "section", "hook", "value"],
)
@pytest.mark.parametrize("words", [("check",), ("show",), ("explain", "model"), ("diff",)], ids=" ".join)
def test_commands_on_configurations_escape_names(
    stratagem: Command, config: str, tmp_path: Path, changes: Mapping[str, Any], words: tuple[str, ...]
) -> None:
    """Keys, types and values of a data file are printed without control characters, in errors as well."""
    file = run_of(config, tmp_path, changes)
    words = ("config", words[0], file, *((config,) if words[0] == "diff" else words[1:]))
    outcome = stratagem(*words)
    assert outcome.out + outcome.err
    assert controls_in(outcome.out + outcome.err) == set()


@pytest.mark.parametrize(
    "text",
    [f"{EVIL}=1", f"model.{EVIL}=1", f"train_cfg.max_epochs={EVIL}", f"custom_hooks=[{EVIL}", EVIL, f"a.{EVIL}.b=[1"],
)
def test_errors_about_overrides_are_escaped(stratagem: Command, config: str, text: str) -> None:
    """An override whose key contains control characters is reported without them."""
    for words in (("config", "check", config), ("config", "show", config), ("train", config)):
        outcome = stratagem(*words, "--set", text)
        assert outcome.out + outcome.err
        assert controls_in(outcome.out + outcome.err) == set()


def test_log_lines_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in names appear neither on the console nor in the log file."""
    logger = Logger("x", log_file=tmp_path / "log")
    logger.warning("Loading %s", EVIL)
    logger.log(logging.ERROR, EVIL)
    logger.close()
    captured = capsys.readouterr()
    assert controls_in(captured.out + captured.err + (tmp_path / "log").read_text(encoding="utf-8")) == set()
    assert "\\x1b[31m" in (tmp_path / "log").read_text(encoding="utf-8")


def test_ordinary_text_is_not_changed() -> None:
    """Letters of all languages, tabs and line feeds remain; a name is one line."""
    text = "Grüße, 你好, \U0001f600\n\tx\\x1b"
    assert escape_controls(text) == text
    assert printable_name("a\nb\tc") == "a\\nb\\tc"
    assert escape_controls("a\x1b\x9b\u202e\udce9") == "a\\x1b\\x9b\\u202e\\udce9"
