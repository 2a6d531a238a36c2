"""Invalid input causes one clear error message and an exit code that shows who can fix the problem; no file is overwritten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its contents, except logs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".log"
    }


def assert_refused(done: Any, *texts: str, status: int = 2) -> None:
    """Require one error message without a traceback, and the exit code."""
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
def test_an_invalid_configuration(stratagem: Command, tmp_path: Path, name: str, text: str, expected: tuple[str, ...]):
    """The error contains the file, the line and the problem."""
    (tmp_path / name).write_text(text)
    before = files(tmp_path)
    assert_refused(stratagem("train", name), *expected)
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_missing_configuration(stratagem: Command):
    """The error contains the missing path."""
    assert_refused(stratagem("train", "there/is/none.py"), "there/is/none.py", "No such file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.type=SupervisdModel", ("--set model.type", "'SupervisdModel'", "'SupervisedModel'")),
        ("model.network.0.type=Liner", ("'Liner'", "'Linear'")),
        ("model=5", ("model must be", "int 5")),
        ("model.network.0.in_feature=2", ("Linear", "'in_feature'", "'in_features'")),
        ("optim_wrapper=5", ("optim_wrapper must be", "int 5")),
        ("optim_wrapper.optimizer=5", ("optimizer", "5")),
        ("optim_wrapper.optimizer.type=AdmW", ("'AdmW'", "'AdamW'")),
        ("optim_wrapper.optimizer.rl=1", ("AdamW", "'rl'")),
        ("param_scheduler=5", ("schedule", "5")),
        ("param_scheduler.0.type=LinerLR", ("'LinerLR'", "'LinearLR'")),
        ("param_scheduler.3.type=LinearLR", ("param_scheduler.3", "1 item")),
        ("train_cfg.max_epochs=0", ("max_epochs must be a positive integer, got 0",)),
        ("train_cfg.max_epoch=3", ("'max_epoch'", "'max_epochs'")),
        ("train_dataloader.dataset.type=CornerSample", ("'CornerSample'", "'CornerSamples'")),
        ("train_dataloader.batch_sise=3", ("batch_sise",)),
        ("default_hooks.loger=None", ("'loger'", "'logger'")),
        ("custom_hooks=[3]", ("stratagem.train.Hook", "3")),
        ("strategy=5", ("strategy", "5")),
        ("val_evaluator=5", ("Expected a torchmetrics metric", "5")),
        ("launcher=torchrum", ("'torchrum'", "pytorch")),
        ("log_level=LOUD", ("'LOUD'",)),
        ("load_form=x", ("'load_form'", "'load_from'")),
        ("just_a_word", ("'just_a_word' is not an override", "key=value")),
        ("model.network.0.in_features=[2", ("']'", "'[2'")),
    ],
)
def test_an_invalid_value(stratagem: Command, config: str, tmp_path: Path, override: str, expected: tuple[str, ...]):
    """The error contains the value and the closest valid one, and a run in the same folder is unchanged."""
    (tmp_path / "run" / "epoch_1").mkdir(parents=True)
    (tmp_path / "run" / "toy_config.py").write_text("kept = True\n")
    before = files(tmp_path)
    assert_refused(stratagem("train", config, "--work-dir", "run", "--set", override), *expected)
    assert files(tmp_path) == before


@pytest.mark.slow
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
def test_conflicting_options(stratagem: Command, config: str, words: tuple[str, ...], expected: tuple[str, ...]):
    """The error contains the option and the fix."""
    done = stratagem("train", config, "--work-dir", "run", *words)
    assert done.status == 2
    assert "Traceback" not in done.err
    for text in expected:
        assert text in done.err


@pytest.mark.parametrize("number", [0, 1])
def test_missing_arguments(stratagem: Command, config: str, number: int):
    """The error names the missing argument."""
    done = stratagem("test", *[config][:number])
    assert done.status == 2
    assert f"Missing argument '{('CONFIG', 'CHECKPOINT')[number]}'" in done.err


def test_without_a_command_the_help_is_shown(stratagem: Command):
    """Without a command, the help is shown."""
    done = stratagem()
    assert done.status == 2
    assert "Commands:" in done.out + done.err


@pytest.mark.slow
def test_a_work_dir_that_cannot_be_created(stratagem: Command, config: str, tmp_path: Path):
    """If the path of the work dir is a file, the error suggests how to choose a different one."""
    (tmp_path / "file").write_text("mine")
    done = stratagem("train", config, "--work-dir", "file/run")
    assert_refused(done, str(tmp_path / "file" / "run"), "--work-dir")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--resume", "--load-from", "test"])
def test_a_missing_checkpoint(stratagem: Command, config: str, command: str):
    """The error for a missing checkpoint contains its path, for every command."""
    words = ("test", config, "gone/epoch_1") if command == "test" else ("train", config, command, "gone/epoch_1")
    assert_refused(stratagem(*words, "--work-dir", "run"), "gone/epoch_1", "no such checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--resume", "--load-from", "test"])
def test_a_path_that_is_not_a_checkpoint(stratagem: Command, config: str, tmp_path: Path, command: str):
    """The error for a path that is not a checkpoint describes what a checkpoint is."""
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "weights.bin").write_bytes(b"1")
    words = ("test", config, "thing") if command == "test" else ("train", config, command, "thing")
    assert_refused(stratagem(*words, "--work-dir", "run"), "thing", "not a Stratagem checkpoint")


@pytest.fixture
def trained(stratagem: Command, config: str, tmp_path: Path) -> Path:
    """The checkpoint of a run with one epoch."""
    assert stratagem("train", config, "--work-dir", "run", "--set", "train_cfg.max_epochs=1").status == 0
    return tmp_path / "run" / "epoch_1"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--resume", "--load-from", "test"])
def test_a_damaged_checkpoint(stratagem: Command, config: str, trained: Path, command: str):
    """A damaged checkpoint exits with 1, because the user did not cause it, and the damaged file is named."""
    largest = max(trained.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-8])
    words = ("test", config, trained) if command == "test" else ("train", config, command, trained)
    before = files(trained.parent)
    assert_refused(stratagem(*words, "--work-dir", "other"), largest.name, status=1)
    assert files(trained.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--resume", "test"])
def test_the_checkpoint_of_a_different_model(stratagem: Command, config: str, trained: Path, command: str):
    """The error for the checkpoint of a different model contains the first mismatched keys and both shapes."""
    words = ("test", config, trained) if command == "test" else ("train", config, command, trained)
    wider = ("--set", "model.network.0.out_features=9", "--set", "model.network.2.in_features=9")
    expected = ("network.0.weight (saved [8, 2], model [9, 2])", "network.0.bias")
    assert_refused(stratagem(*words, "--work-dir", "run", *wider), *expected)


@pytest.mark.slow
def test_an_error_in_user_code(stratagem: Command, config: str):
    """An error in code that the configuration uses exits with 1 and shows its class and location."""
    # The loss reads a class that the model does not predict.
    done = stratagem("train", config, "--work-dir", "run", "--set", "model.network.2.out_features=2")
    assert done.status == 1
    assert "IndexError" in done.err
    assert "Use --traceback" in done.err
    assert "Traceback" not in done.err


def test_a_traceback_is_shown_on_request(stratagem: Command, config: str):
    """With --traceback, the traceback is followed by the same message and exit code."""
    done = stratagem("train", config, "--work-dir", "run", "--set", "model.type=Foo", "--traceback")
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err
    assert "stratagem: error: " in done.err
