"""Commands that inspect configurations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stratagem.cli.main import spell_out_resume


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A configuration with a base that sets the learning rate, which the child changes."""
    (tmp_path / "base.py").write_text("optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\n")
    child = tmp_path / "child.py"
    child.write_text(
        "_base_ = 'base.py'\n\noptim_wrapper = dict(optimizer=dict(lr=0.2))\nmodel = dict(type='Identity')\n"
    )
    return child


@pytest.mark.slow
def test_show_prints_the_merged_configuration(stratagem: Callable, family: Path) -> None:  # type: ignore[type-arg]
    """`config show --as yaml` prints the configuration after merging bases, file and --set."""
    shown = stratagem("config", "show", family, "--as", "yaml", "--set", "log_level=DEBUG")
    assert shown.status == 0
    assert yaml.safe_load(shown.out) == {
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.2}},
        "model": {"type": "Identity"},
        "log_level": "DEBUG",
    }


@pytest.mark.slow
def test_show_rejects_an_unknown_format(stratagem: Callable, family: Path) -> None:  # type: ignore[type-arg]
    """An unknown format is rejected with the closest name."""
    shown = stratagem("config", "show", family, "--as", "yml")
    assert (shown.status, shown.out) == (2, "")
    assert "Did you mean 'yaml'?" in shown.err


@pytest.mark.slow
def test_explain_lists_every_file_and_line(stratagem: Callable, family: Path) -> None:  # type: ignore[type-arg]
    """`config explain` prints the line of the base, the line of the child and the override, in order."""
    explained = stratagem(
        "config", "explain", family, "optim_wrapper.optimizer.lr", "--set", "optim_wrapper.optimizer.lr=0.3"
    )
    lines = explained.out.splitlines()
    assert explained.status == 0
    assert ["base.py:1" in lines[1], "child.py:3" in lines[2], "--set" in lines[3]] == [True] * 3
    assert [line.rstrip().rsplit(" ", 1)[1] for line in lines[1:]] == ["0.1", "0.2", "0.3"]


@pytest.mark.slow
def test_diff_compares_two_files(stratagem: Callable, family: Path) -> None:  # type: ignore[type-arg]
    """`config diff` prints the differences, or that there are none."""
    different = stratagem("config", "diff", family.with_name("base.py"), family)
    assert different.status == 0
    assert "0.1" in different.out
    assert "0.2" in different.out
    assert stratagem("config", "diff", family, family).out == "No differences.\n"


@pytest.mark.slow
def test_check_lists_all_problems(stratagem: Callable, family: Path) -> None:  # type: ignore[type-arg]
    """`config check` exits with 2 and lists each problem with its location and the closest name."""
    valid = family.with_name("valid.py")
    valid.write_text("model = dict(type='Identity')\n")
    assert stratagem("config", "check", valid).status == 0
    wrong = stratagem("config", "check", family, "--set", "optim_wrapper.optimizer.momentun=1", "--set", "rezume=1")
    assert wrong.status == 2
    assert "2 problems" in wrong.err
    assert "'resume'" in wrong.err
    assert "Traceback" not in wrong.err


def test_resume_without_a_path_is_spelled_out() -> None:
    """--resume before an option, at the end, or before the configuration means the latest checkpoint."""
    assert spell_out_resume(["train", "c.py", "--resume"]) == ["train", "c.py", "--resume=auto"]
    assert spell_out_resume(["train", "--resume", "c.py"]) == ["train", "--resume=auto", "c.py"]
    assert spell_out_resume(["train", "--resume", "--nproc", "2"])[1] == "--resume=auto"
    assert spell_out_resume(["train", "c.py", "--resume", "w/epoch_1"])[2:] == ["--resume", "w/epoch_1"]


@pytest.mark.parametrize(("name", "searched"), [("run.yaml", False), ("run.py", True)])
def test_the_working_directory_is_only_searched_for_programs(
    stratagem: Callable,  # type: ignore[type-arg]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    searched: bool,
) -> None:
    """For a data file, `python -m stratagem` does not import files from the working directory."""
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    (tmp_path / "run.yaml").write_text("model: {type: Identity}\n")
    (tmp_path / "run.py").write_text("model = dict(type='Identity')\n")
    assert stratagem("config", "check", name).status == 0
    assert (str(tmp_path) in sys.path) is searched
    assert ("" in sys.path) is searched


@pytest.mark.slow
def test_check_lists_invalid_arguments_of_a_data_file(stratagem: Callable, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """Each invalid argument of a data file is listed with its line before anything is built."""
    (tmp_path / "run.yaml").write_text(
        "model:\n  type: ModelWithLoss\n  network:\n    type: Linear\n    in_features: 1\n    out_features: 1\n"
        "compile:\n  options: {cpp.cxx: [./evil.sh]}\n  backend: os.system\n"
        "env_cfg:\n  dist_cfg: {init_method: 'tcp://stranger:1'}\n"
    )
    checked = stratagem("config", "check", "run.yaml")
    assert checked.status == 2
    for path, line in (("compile.options", 8), ("compile.backend", 9), ("env_cfg.dist_cfg.init_method", 11)):
        assert f"{path} (run.yaml:{line}): a data file cannot set" in checked.err


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_the_command_names_the_file_the_line_and_the_key(stratagem: Callable, tmp_path: Path, suffix: str) -> None:
    """``stratagem config check`` exits with status 2 and prints where the value was set, also if it is an option."""
    values = {".py": "model = dict(type='Identity')\ntrain_cfg = dict(\n    max_epochs=0)\n",
              ".yaml": "model: {type: Identity}\ntrain_cfg:\n  max_epochs: 0\n"}  # fmt: skip
    file = tmp_path / f"config{suffix}"
    file.write_text(values[suffix])
    checked = stratagem("config", "check", file)
    assert checked.status == 2
    assert f"train_cfg.max_epochs ({file}:3): max_epochs must be a positive integer, got 0." in " ".join(
        checked.err.split()
    )
    overridden = stratagem("config", "check", file, "--set", "train_cfg.max_epochs=-1")
    assert "train_cfg.max_epochs (--set train_cfg.max_epochs): max_epochs must be" in " ".join(overridden.err.split())
