from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem import Config, DDPStrategy, Runner, SingleDeviceStrategy
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, LaunchError, StateError
from tests.train.toys import QUIET_HOOKS, TEST, TRAINING, VALIDATION, At, Recorder, Samples, Toy, loader, settings

MakeRunner = Callable[..., Runner]


@pytest.mark.parametrize("missing", [*TRAINING, *VALIDATION, *TEST])
def test_a_partial_section_is_rejected(make_runner: MakeRunner, missing: str):
    """A section given in part, such as data without a loop, is rejected; the message names the missing arguments."""
    group = next(group for group in (TRAINING, VALIDATION, TEST) if missing in group)
    with pytest.raises(ConfigValueError, match=f"was specified without {missing}. Specify all of them or none"):
        make_runner(**{**group, missing: None})


def test_schedules_without_an_optimizer_are_rejected(make_runner: MakeRunner):
    """Parameter schedulers without an optimizer are rejected, because they would have nothing to schedule."""
    nothing = dict.fromkeys(TRAINING)
    with pytest.raises(ConfigValueError, match="param_scheduler was specified without optim_wrapper"):
        make_runner(**nothing, param_scheduler={"type": "ExponentialLR", "gamma": 0.5})


@pytest.mark.parametrize("wrong", [3, "true", None, [True]])
def test_compile_is_true_false_or_a_mapping(make_runner: MakeRunner, wrong: Any):
    """Any other value of ``compile`` is rejected in the constructor, not in the first iteration."""
    with pytest.raises(ConfigTypeError, match="compile must be True, False or a mapping"):
        make_runner(compile=wrong)


def test_a_path_to_resume_and_one_to_load_from_are_rejected(make_runner: MakeRunner):
    """Giving both ``resume`` and ``load_from`` a path is ambiguous and is rejected."""
    with pytest.raises(ConfigValueError, match=r"resume='a' and load_from='b'.*Set only one"):
        make_runner(resume="a", load_from="b")


def test_the_data_preprocessor_is_added_to_the_model_configuration(make_runner: MakeRunner):
    """The runner passes ``data_preprocessor`` to the model; one in the model's own configuration takes precedence."""

    class Doubling(nn.Module):
        def forward(self, data: Any, training: bool) -> Any:
            return [data[0] * 2, *data[1:]]

    class Preprocessed(Toy):
        def __init__(self, data_preprocessor: Any) -> None:
            super().__init__()
            self.data_preprocessor = data_preprocessor

    given = {"type": Preprocessed}
    runner = make_runner(model=given, data_preprocessor=Doubling())
    runner.train()
    assert isinstance(runner.strategy.model.data_preprocessor, Doubling)
    assert given == {"type": Preprocessed}


def test_a_data_preprocessor_for_a_built_model_is_rejected(make_runner: MakeRunner):
    """A ``data_preprocessor`` next to an already built model is rejected, because it would be ignored."""
    with pytest.raises(ConfigValueError, match="is already built"):
        make_runner(model=Toy(), data_preprocessor={"type": "BaseDataPreprocessor"})


# ---- from a configuration -------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    """Write a configuration and return its path."""
    path.write_text(text)
    return path


MODEL = "model = dict(type='Identity')\n"


def test_every_unknown_key_is_reported_with_its_line_and_the_closest_name(tmp_path: Path):
    """All unknown keys are reported together, before anything is built, each with its line and the closest name."""
    file = write(
        tmp_path / "typos.py", "vars = dict()\nparam_schedulers = []\nload_form = 'x'\nrezume = True\n" + MODEL
    )
    with pytest.raises(ConfigKeyError) as caught:
        Runner.from_cfg(Config.fromfile(file))
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for number, wrong, right in [
        (2, "param_schedulers", "param_scheduler"),
        (3, "load_form", "load_from"),
        (4, "rezume", "resume"),
    ]:
        assert any(f"typos.py:{number}" in line and f"'{wrong}'" in line and f"'{right}'" in line for line in lines)


def test_user_values_are_allowed_below_vars(tmp_path: Path):
    """Keys below ``vars`` are not checked."""
    cfg = {**settings(work_dir=str(tmp_path)), "vars": {"width": 3}}
    Runner.from_cfg(cfg).close()


def test_a_configuration_without_a_model_is_rejected(tmp_path: Path):
    """A configuration without ``model`` is rejected, and the message names the file."""
    file = write(tmp_path / "empty.py", f"work_dir = {str(tmp_path)!r}\n")
    with pytest.raises(ConfigKeyError, match=r"empty\.py has no key 'model'"):
        Runner.from_cfg(Config.fromfile(file))


@pytest.mark.slow
def test_from_cfg_passes_on_every_key(tmp_path: Path):
    """``from_cfg`` passes on every key, ``compile`` included, and works without ``env_cfg``."""
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    cfg = settings(work_dir=str(tmp_path), train_cfg={"max_iters": 1}, compile={"backend": backend})
    runner = Runner.from_cfg(cfg)
    runner.train()
    runner.close()
    assert calls


def test_the_file_names_the_experiment_and_the_configuration_is_saved(tmp_path: Path):
    """The file names the experiment; the final configuration is saved in the work directory and can be rerun."""
    text = "model = dict(type='SupervisedModel', network=dict(type='Linear', in_features=4, out_features=3),\n"
    text += "             loss=dict(type='CrossEntropyLoss'))\nlog_level = 'ERROR'\n"
    cfg = Config.fromfile(write(tmp_path / "tiny.py", text))
    work = tmp_path / "work"
    cfg.merge_from_dict({"work_dir": str(work), "default_hooks": dict(QUIET_HOOKS), "train_cfg": {"max_iters": 1}})
    cfg.merge_from_dict({"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.5}}})
    runner = Runner(**{key: cfg[key] for key in cfg}, train_dataloader=pairs(), cfg=cfg)
    assert runner.strategy.experiment_name == f"tiny_{runner.strategy.timestamp}"
    assert not (work / "tiny.py").exists()
    runner.train()
    runner.close()
    assert Config.fromfile(work / "tiny.py").to_dict() == cfg.to_dict()


def pairs() -> dict[str, Any]:
    """Return the configuration of a loader of (features, class) pairs."""
    samples = Samples()
    return loader(dataset=torch.utils.data.TensorDataset(samples.features, samples.classes))


def test_a_run_that_cannot_start_keeps_the_saved_configuration(tmp_path: Path):
    """A run that fails before its first iteration does not overwrite the configuration that an earlier run saved."""
    kept = write(tmp_path / "config.py", "kept = True\n")
    rules = {"layer_decay": {"rate": 0.5, "layers": r"missing\.(\d+)"}}  # The check of the configuration has no model.
    optim_wrapper = {"optimizer": {"type": "SGD", "lr": 1.0}, "paramwise_cfg": rules}
    broken = settings(work_dir=str(tmp_path), optim_wrapper=optim_wrapper)
    cfg = Config(broken, filename="config.py")
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ConfigValueError, match="no parameter matches"):
        runner.train()
    runner.close()
    assert kept.read_text() == "kept = True\n"
    assert [path.name for path in tmp_path.glob("*.py")] == ["config.py"]


# ---- strategies -----------------------------------------------------------------------------------------------------


def test_single_device_is_the_default(make_runner: MakeRunner):
    """Without a launcher the strategy is SingleDeviceStrategy."""
    assert isinstance(make_runner().strategy, SingleDeviceStrategy)


def test_ddp_is_the_default_with_a_launcher(make_runner: MakeRunner):
    """With a launcher the default is DDPStrategy; the error explains how to launch a process that was not launched."""
    with pytest.raises(LaunchError, match=r"'pytorch'.*not started by it") as caught:
        make_runner(launcher="pytorch")
    assert "DDPStrategy" in "".join(caught.value.__notes__)


def test_ddp_without_processes_is_rejected(make_runner: MakeRunner):
    """DDPStrategy in a process that no launcher started is rejected, and the message shows the launch command."""
    with pytest.raises(LaunchError, match="--nproc N"):
        make_runner(strategy={"type": DDPStrategy})


def test_a_strategy_can_be_given_by_name(make_runner: MakeRunner):
    """A strategy can be given by its registered name alone."""
    assert isinstance(make_runner(strategy="SingleDeviceStrategy").strategy, SingleDeviceStrategy)


@pytest.mark.parametrize(
    "argument",
    [
        {"launcher": "none"},
        {"work_dir": "elsewhere"},
        {"env_cfg": {}},
        {"randomness": {"seed": 1}},
        {"auto_scale_lr": {}},
        {"experiment_name": "first"},
        {"log_level": "INFO"},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_that_a_built_strategy_would_ignore_are_rejected(tmp_path: Path, argument: dict):
    """Arguments that belong to the strategy are rejected next to a built strategy, because they would be ignored."""
    strategy = SingleDeviceStrategy(work_dir=tmp_path, log_kwargs={"log_level": "ERROR"})
    rest = {key: value for key, value in settings().items() if key not in ("randomness", "log_level")}
    with pytest.raises(ConfigValueError, match=f"{next(iter(argument))} would be ignored"):
        Runner(**rest, strategy=strategy, **argument)
    runner = Runner(**rest, strategy=strategy)
    assert runner.strategy is strategy
    runner.close()


def test_a_type_that_does_not_build_a_strategy_is_rejected(make_runner: MakeRunner):
    """A ``type`` that does not build a strategy is rejected, and the message names the type that it built."""

    def make(**arguments: Any) -> dict[str, Any]:
        return arguments

    with pytest.raises(ConfigTypeError, match="dict, which is not a strategy"):
        make_runner(strategy={"type": make})


# ---- train, val, test -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "val", "test"])
def test_a_command_without_its_section_is_rejected(make_runner: MakeRunner, command: str):
    """Running a command whose section is missing names the missing arguments."""
    runner = make_runner(**dict.fromkeys(TRAINING))
    with pytest.raises(StateError, match=f"{command}_dataloader, {command}_cfg"):
        getattr(runner, command)()


def test_testing_before_training_does_not_change_training(make_runner: MakeRunner, tmp_path: Path):
    """The optimizer is built on demand, and the losses equal those of a run that did not test first."""
    plain, tested = Recorder(), Recorder()
    make_runner(custom_hooks=[plain]).train()
    runner = make_runner(custom_hooks=[tested], work_dir=tmp_path / "tested", **TEST)
    runner.test()
    runner.train()
    assert tested.rows == plain.rows


def test_training_twice_trains_once(make_runner: MakeRunner):
    """A second ``train()`` of a finished run does nothing."""
    recorder = Recorder()
    runner = make_runner(custom_hooks=[recorder], train_cfg={"max_epochs": 1}, **VALIDATION)
    model = runner.train()
    assert runner.train() is model
    assert len(recorder.rows) == 7
    assert len(recorder.metrics) == 1


@pytest.mark.slow
def test_training_resumes_fully_after_an_evaluation_that_resumed(make_runner: MakeRunner):
    """``val()`` loads only the weights; the later ``train()`` still restores momentum, schedules and the position."""
    hooks = {"runtime_info": None, "logger": None}
    whole, first, rest = Recorder(), Recorder(), Recorder()
    make_runner(custom_hooks=[whole], train_cfg={"max_epochs": 2}, **VALIDATION).train()
    make_runner(custom_hooks=[first], default_hooks=hooks, train_cfg={"max_epochs": 1}, **VALIDATION).train()
    runner = make_runner(
        custom_hooks=[rest], default_hooks=hooks, resume=True, train_cfg={"max_epochs": 2}, **VALIDATION
    )
    assert runner.val() == whole.metrics[0][1]
    runner.train()
    assert first.rows + rest.rows == whole.rows


@pytest.mark.slow
def test_testing_evaluates_the_weights_of_load_from(make_runner: MakeRunner, tmp_path: Path):
    """``test()`` with ``load_from`` gives the metrics of the run that saved the checkpoint."""
    hooks = {"runtime_info": None, "logger": None}
    trained = make_runner(default_hooks=hooks, **TEST)
    trained.train()
    expected = trained.test()
    runner = make_runner(
        load_from=tmp_path / "run" / "epoch_3", work_dir=tmp_path / "other", randomness={"seed": 8}, **TEST
    )
    assert runner.test(strict=True) == expected
    weights = trained.strategy.model_state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in runner.strategy.model_state_dict().items())
    assert not list((tmp_path / "other").glob("*.py"))


@pytest.mark.parametrize("how", [{"resume": True}, {"load_from": True}])
def test_the_checkpoint_of_another_model_is_rejected(make_runner: MakeRunner, tmp_path: Path, how: dict):
    """Resuming it, or testing it strictly, lists the first mismatched keys and changes no parameter."""

    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0] = nn.Linear(4, 9)
            self.layers[3] = nn.Linear(9, 3)

    make_runner(default_hooks={"runtime_info": None, "logger": None}, train_cfg={"max_epochs": 1}).train()
    arguments = {key: tmp_path / "run" / "epoch_1" if key == "load_from" else value for key, value in how.items()}
    runner = make_runner(model={"type": Wider}, **arguments, **TEST)
    with pytest.raises(ValueError, match=r"layers\.0\.weight \(saved \[8, 4\], model \[9, 4\]\)"):
        runner.test(strict=True) if "load_from" in how else runner.train()


def test_training_returns_the_model(make_runner: MakeRunner):
    """``train()`` returns the model as the strategy placed it."""
    runner = make_runner(train_cfg={"max_iters": 1})
    assert runner.train() is runner.strategy.model


def test_closing_twice_is_the_same_as_once(make_runner: MakeRunner):
    """Calling ``close()`` twice is the same as calling it once, so it is safe in a ``finally`` clause."""
    runner = make_runner(train_cfg={"max_iters": 1}, custom_hooks=[At(1, lambda run: run.record({"x": 1}))])
    runner.train()
    runner.close()
    runner.close()
