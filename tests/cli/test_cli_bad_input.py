"""Whatever is wrong: one clear message, a status that says whose mistake it is, and nothing overwritten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, logs apart."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".log"
    }


def assert_refused(done: Any, *texts: str, status: int = 2) -> None:
    """One message, no traceback, the status."""
    assert done.status == status, done.err
    assert "Traceback" not in done.err
    assert done.err.count("stratagem: error:") == 1
    for text in texts:
        assert text in done.err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("syntax.py", "model = dict(\n", ("syntax.py:1", "is not valid Python")),
        ("broken.yaml", "model: [1, 2\n", ("broken.yaml:2", "is not valid YAML")),
        ("broken.json", '{"model": }', ("broken.json:1", "JSON")),
        ("broken.toml", "model = [", ("broken.toml", "TOML")),
        ("words.txt", "model", ("'.txt'", ".yaml")),
        ("nothing.py", "work_dir = 'w'\n", ("nothing.py", "no key 'model'")),
        ("typo.py", "model = dict(type='x')\nrezume = True\n", ("typo.py:2", "'rezume'", "'resume'")),
        ("raises.py", "model = 1 / 0\n", ("raises.py:1", "division by zero")),
    ],
)
def test_a_configuration_that_cannot_be_used(
    stratagem: Command, tmp_path: Path, name: str, text: str, expected: tuple[str, ...]
):
    """The file and the line, and what is wrong there."""
    (tmp_path / name).write_text(text)
    before = files(tmp_path)
    assert_refused(stratagem("train", name), *expected)
    assert files(tmp_path) == before


def test_a_configuration_that_does_not_exist(stratagem: Command):
    """The path that was looked for."""
    assert_refused(stratagem("train", "there/is/none.py"), "there/is/none.py", "No such file")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.type=SupervisdModel", ("--set model.type", "'SupervisdModel'", "'SupervisedModel'")),
        ("model.network.0.type=Liner", ("'Liner'", "'Linear'")),
        ("model=5", ("A model is", "int 5")),
        ("model.network.0.in_feature=2", ("Linear", "'in_feature'", "'in_features'")),
        ("optim_wrapper=5", ("An optimizer wrapper is", "int 5")),
        ("optim_wrapper.optimizer=5", ("optimizer", "5")),
        ("optim_wrapper.optimizer.type=AdmW", ("'AdmW'", "'AdamW'")),
        ("optim_wrapper.optimizer.rl=1", ("AdamW", "'rl'")),
        ("param_scheduler=5", ("schedule", "5")),
        ("param_scheduler.0.type=LinerLR", ("'LinerLR'", "'LinearLR'")),
        ("param_scheduler.3.type=LinearLR", ("param_scheduler.3", "1 item")),
        ("train_cfg.max_epochs=0", ("max_epochs is 0",)),
        ("train_cfg.max_epoch=3", ("'max_epoch'", "'max_epochs'")),
        ("train_dataloader.dataset.type=CornerSample", ("'CornerSample'", "'CornerSamples'")),
        ("train_dataloader.batch_sise=3", ("batch_sise",)),
        ("default_hooks.loger=None", ("'loger'", "'logger'")),
        ("custom_hooks=[3]", ("A hook is", "3")),
        ("strategy=5", ("strategy", "5")),
        ("val_evaluator=5", ("A metric is", "5")),
        ("launcher=torchrum", ("'torchrum'", "pytorch")),
        ("log_level=LOUD", ("'LOUD'",)),
        ("load_form=x", ("'load_form'", "'load_from'")),
        ("just_a_word", ("'just_a_word' is no override", "key=value")),
        ("model.network.0.in_features=[2", ("']'", "'[2'")),
    ],
)
def test_a_value_that_cannot_be_used(
    stratagem: Command, config: str, tmp_path: Path, override: str, expected: tuple[str, ...]
):
    """What was given, and the nearest that is known; a finished run in the same folder stays as it is."""
    (tmp_path / "run" / "epoch_1").mkdir(parents=True)
    (tmp_path / "run" / "toy_config.py").write_text("kept = True\n")
    before = files(tmp_path)
    assert_refused(stratagem("train", config, "--work-dir", "run", "--set", override), *expected)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--strategy", "ddp"), ("DDPStrategy", "--nproc N")),
        (("--strategy", "dpp"), ("--strategy dpp", "'ddp'")),
        (("--nproc", "2", "--launcher", "none"), ("--nproc 2", "'none'")),
        (("--nproc", "2", "--launcher", "slurm"), ("--nproc 2", "'slurm'")),
        (("--nproc", "0"), ("--nproc",)),
        (("--launcher", "pytorch"), ("'pytorch'", "RANK")),
        (("--launcher", "foo"), ("'foo'", "slurm")),
        (("--wrok-dir", "x"), ("--wrok-dir", "--work-dir")),
        (("--resume", "a", "--load-from", "b"), ("resume='a'", "load_from='b'")),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(
    stratagem: Command, config: str, words: tuple[str, ...], expected: tuple[str, ...]
):
    """The option, and what to do."""
    done = stratagem("train", config, "--work-dir", "run", *words)
    assert done.status == 2
    assert "Traceback" not in done.err
    for text in expected:
        assert text in done.err


@pytest.mark.parametrize("number", [0, 1])
def test_missing_arguments(stratagem: Command, config: str, number: int):
    """The argument that is missing is named."""
    done = stratagem("test", *[config][:number])
    assert done.status == 2
    assert f"Missing argument '{('CONFIG', 'CHECKPOINT')[number]}'" in done.err


def test_without_a_command_the_help_is_shown(stratagem: Command):
    """Rather than a traceback."""
    done = stratagem()
    assert done.status == 2
    assert "Commands:" in done.out + done.err


def test_a_work_dir_that_cannot_be_made(stratagem: Command, config: str, tmp_path: Path):
    """A file is in its place; the message says how to choose another."""
    (tmp_path / "file").write_text("mine")
    done = stratagem("train", config, "--work-dir", "file/run")
    assert_refused(done, str(tmp_path / "file" / "run"), "--work-dir")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["--resume", "--load-from", "test"])
def test_a_checkpoint_that_is_not_there(stratagem: Command, config: str, command: str):
    """Named, for each way to use one."""
    words = ("test", config, "gone/epoch_1") if command == "test" else ("train", config, command, "gone/epoch_1")
    assert_refused(stratagem(*words, "--work-dir", "run"), "gone/epoch_1", "no such checkpoint")


@pytest.mark.parametrize("command", ["--resume", "--load-from", "test"])
def test_a_checkpoint_that_is_not_ours(stratagem: Command, config: str, tmp_path: Path, command: str):
    """What a checkpoint looks like is told."""
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "weights.bin").write_bytes(b"1")
    words = ("test", config, "thing") if command == "test" else ("train", config, command, "thing")
    assert_refused(stratagem(*words, "--work-dir", "run"), "thing", "not a checkpoint of Stratagem")


@pytest.fixture
def trained(stratagem: Command, config: str, tmp_path: Path) -> Path:
    """A run of one epoch."""
    assert stratagem("train", config, "--work-dir", "run", "--set", "train_cfg.max_epochs=1").status == 0
    return tmp_path / "run" / "epoch_1"


@pytest.mark.parametrize("command", ["--resume", "--load-from", "test"])
def test_a_checkpoint_that_is_damaged(stratagem: Command, config: str, trained: Path, command: str):
    """Status 1: not the user's mistake. The file that is damaged is named."""
    largest = max(trained.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-8])
    words = ("test", config, trained) if command == "test" else ("train", config, command, trained)
    before = files(trained.parent)
    assert_refused(stratagem(*words, "--work-dir", "other"), largest.name, status=1)
    assert files(trained.parent) == before


@pytest.mark.parametrize("command", ["--resume", "test"])
def test_the_checkpoint_of_another_model(stratagem: Command, config: str, trained: Path, command: str):
    """The first keys that differ, with both shapes."""
    words = ("test", config, trained) if command == "test" else ("train", config, command, trained)
    wider = ("--set", "model.network.0.out_features=9", "--set", "model.network.2.in_features=9")
    expected = ("network.0.weight (saved [8, 2], here [9, 2])", "network.0.bias")
    assert_refused(stratagem(*words, "--work-dir", "run", *wider), *expected)


def test_a_failure_is_not_a_mistake(stratagem: Command, config: str):
    """An error of the code that the configuration names: status 1, its class, and where it happened."""
    # Four classes are predicted, and the loss is told to look at a fifth that is not there.
    done = stratagem("train", config, "--work-dir", "run", "--set", "model.network.2.out_features=2")
    assert done.status == 1
    assert "IndexError" in done.err
    assert "--traceback shows all of it" in done.err
    assert "Traceback" not in done.err


def test_a_traceback_is_shown_where_it_is_asked_for(stratagem: Command, config: str):
    """With the same message at the end, and the same status."""
    done = stratagem("train", config, "--work-dir", "run", "--set", "model.type=Foo", "--traceback")
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err
    assert "stratagem: error: " in done.err
