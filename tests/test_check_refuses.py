"""``stratagem config check`` rejects what building a run and the start of training reject, with the same message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from stratagem import Runner
from stratagem.config import Config
from stratagem.config_schema import check_run
from stratagem.errors import ConfigValueError, LaunchError, StratagemError
from stratagem.registry import DATASETS, OPTIMIZERS
from stratagem.train import Hook
from tests.train.toys import TEST, VALIDATION, Toy, loader, settings

# Each of several hundred configurations is checked and built.
pytestmark = pytest.mark.slow

SGD = {"type": "SGD", "lr": 0.1}
ADAM = {"type": "AdamW", "lr": 0.1}
EMA = {"type": "EMAHook"}
STOP = {"type": "EarlyStoppingHook", "monitor": "loss"}
ACCURACY = {"type": "Accuracy", "task": "multiclass", "num_classes": 3}
ITERS = {"by_epoch": False, "max_iters": 4}


class Counting(Hook):
    """A hook of another package with a state and without a constructor."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}


class Renamed(Hook):
    """A hook of another package whose constructor sets its key."""

    def __init__(self, name: str) -> None:
        self.state_key = name

    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}


class Stream(IterableDataset[int]):
    """A stream that must not be built by the check."""

    def __init__(self) -> None:
        raise AssertionError("The check must not build a dataset.")


DATASETS.register_module(name="StreamOfCheck", module=Stream)


@OPTIMIZERS.register_module(name="OptimizerOfCheck")
class Foreign(torch.optim.SGD):
    """An optimizer of another package."""


def optim(optimizer: Any = SGD, **options: Any) -> dict[str, Any]:
    """Return the changes that set an optimizer wrapper."""
    return {"optim_wrapper": {"optimizer": optimizer, **options}}


def schedule(kind: str, **options: Any) -> dict[str, Any]:
    """Return the changes that set a parameter scheduler."""
    return {"param_scheduler": [{"type": kind, **options}]}


def data(**changes: Any) -> dict[str, Any]:
    """Return the changes that set arguments of the training data loader."""
    return {"train_dataloader": loader(**changes)}


def train(**options: Any) -> dict[str, Any]:
    """Return the changes that set options of the training loop."""
    return {"train_cfg": {"max_epochs": 2, **options}}


def strategy(kind: str, **options: Any) -> dict[str, Any]:
    """Return the changes that set a strategy."""
    return {"strategy": {"type": f"{kind}Strategy", **options}}


def hooks(*custom: Any, **default: Any) -> dict[str, Any]:
    """Return the changes that set hooks."""
    return {"custom_hooks": list(custom), "default_hooks": default}


def evaluator(value: Any) -> dict[str, Any]:
    """Return the changes that set a validation with an evaluator."""
    return {**VALIDATION, "val_evaluator": value}


# The changes of a valid configuration, and the path of the problem.
MIXED: dict[str, Any] = {
    "type": "MixedOptimizer",
    "parts": {"muon": {"type": "Muon", "lr": 0.02}, "adamw": {"type": "AdamW", "lr": 0.1}},
    "hidden_matrices": "muon",
    "others": "adamw",
}


def _mixed(**changes: Any) -> dict[str, Any]:
    """Return the configuration of a mixed optimizer, without the keys whose value is None."""
    merged = {**MIXED, **changes}
    return {"optim_wrapper": {"optimizer": {key: value for key, value in merged.items() if value is not None}}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    # the parts of a mixed optimizer
    (_mixed(others="adam"), "optim_wrapper.optimizer"),
    (_mixed(others=None), "optim_wrapper.optimizer"),
    (_mixed(rule={"head": "adamw"}), "optim_wrapper.optimizer.rule"),
    (_mixed(rules={"(": "adamw"}), "optim_wrapper.optimizer.rules"),
    (_mixed(parts={**MIXED["parts"], "muon": {"type": "Muon", "lr": -1.0}}), "optim_wrapper"),
    ({**_mixed(), "param_scheduler": {"type": "ConstantLR", "part": "moun"}}, "param_scheduler.part"),
    ({**_mixed(), "param_scheduler": {"muon": {"type": "ConstantLR"}, "adamw": []}}, "param_scheduler"),
    # phases and the model
    ({**VALIDATION, "val_dataloader": None}, "val_cfg"),
    ({**VALIDATION, "val_evaluator": None}, "val_dataloader"),
    ({"val_cfg": {}}, "val_cfg"),
    ({**TEST, "test_cfg": None}, "test_dataloader"),
    ({"train_cfg": None}, "train_dataloader"),
    ({"optim_wrapper": None}, "train_dataloader"),
    (
        {"train_dataloader": None, "train_cfg": None, "optim_wrapper": None, **schedule("StepLR", step_size=1)},
        "param_sch",
    ),
    ({"model": 5}, "model"),
    ({"model": torch.nn.Linear(1, 1), "data_preprocessor": {"type": "BaseDataPreprocessor"}}, "data_preprocessor"),
    # loops
    *[(train(max_epochs=value), "train_cfg.max_epochs") for value in (0, -1, True, 1.5, "3")],
    *[(train(val_interval=value), "train_cfg.val_interval") for value in (0, -2, True, 2.0)],
    *[(train(val_begin=value), "train_cfg.val_begin") for value in (-1, False, 1.0)],
    (train(dynamic_intervals=[(1, 0)]), "train_cfg"),
    (train(dynamic_intervals=[5]), "train_cfg.dynamic_intervals"),
    (train(dynamic_intervals=5), "train_cfg.dynamic_intervals"),
    (train(uneven_data="longest"), "train_cfg.uneven_data"),
    *[({"train_cfg": {"by_epoch": False, "max_iters": value}}, "train_cfg.max_iters") for value in (0, -1, True, 1e3)],
    ({"train_cfg": {"by_epoch": False, "max_steps": 0}}, "train_cfg.max_steps"),
    ({"train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 1, "max_steps": 1}}, "train_cfg"),
    ({"train_cfg": {"by_epoch": "yes", "max_epochs": 1}}, "train_cfg.by_epoch"),
    ({"train_cfg": 5}, "train_cfg"),
    ({**VALIDATION, "val_cfg": {"fp16": "yes"}}, "val_cfg.fp16"),
    # data loaders
    *[(data(batch_size=value), "train_dataloader") for value in (0, -1, True, 2.5)],
    (data(num_workers=-1), "train_dataloader.num_workers"),
    (data(persistent_workers=True), "train_dataloader"),
    (data(prefetch_factor=2), "train_dataloader"),
    (data(timeout=-1), "train_dataloader.timeout"),
    (data(batch_size=None, drop_last=True), "train_dataloader"),
    (data(sampler={"type": "DefaultSampler"}, shuffle=True), "train_dataloader"),
    (data(collate_fn=3), "train_dataloader.collate_fn"),
    (data(streams="never"), "train_dataloader.streams"),
    (data(dataset=5), "train_dataloader"),
    (data(num_workers=1, multiprocessing_context="thread"), "train_dataloader"),
    ({"train_dataloader": 5}, "train_dataloader"),
    # optimizers
    (optim({"type": "SGD", "lr": -0.1}), "optim_wrapper"),
    (optim({"type": "SGD", "lr": 0.1, "momentum": -1}), "optim_wrapper"),
    (optim({"type": "AdamW", "lr": 0.1, "betas": (0.9, 1.5)}), "optim_wrapper"),
    (optim({"type": "SGD", "lr": 0.1, "nesterov": True}), "optim_wrapper"),
    *[(optim(accumulative_counts=value), "optim_wrapper") for value in (0, 1.5)],
    (optim(clip_grad={"max_norm": -1}), "optim_wrapper"),
    (optim(clip_grad={"max_norn": 1}), "optim_wrapper"),
    (optim(clip_grad=1.0), "optim_wrapper"),
    (optim(nonfinite="ignore"), "optim_wrapper"),
    (optim({"type": "Rprop", "lr": 0.1}, implementation="fused"), "optim_wrapper"),
    (optim({"type": "SGD", "lr": 0.1, "foreach": True}, implementation="loop"), "optim_wrapper"),
    (optim(type="AmpOptimWrapper", dtype="float8"), "optim_wrapper"),
    (optim(type="AmpOptimWrapper", dtype="bfloat16", loss_scale=2.0), "optim_wrapper"),
    (optim(type="AmpOptimWrapper", dtype="float16", loss_scale={"growth": 1}), "optim_wrapper"),
    (optim(type="AmpOptimWrapper", dtype="float16", nonfinite="error"), "optim_wrapper"),
    (optim({"type": "OptimizerOfCheck", "lr": 0.1}, accumulative_counts=0), "optim_wrapper"),
    ({"optim_wrapper": {"accumulative_counts": 2}}, "optim_wrapper"),
    ({"optim_wrapper": {}}, "optim_wrapper"),
    ({"optim_wrapper": 5}, "optim_wrapper"),
    # schedules
    (schedule("StepLR", step_size=0), "param_scheduler"),
    (schedule("LinearLR", start_factor=2.0, end=2), "param_scheduler"),
    (schedule("LinearLR", begin=5, end=2), "param_scheduler"),
    (schedule("ConstantLR", begin=-1, end=2), "param_scheduler"),
    (schedule("CosineAnnealingLR", T_max=0), "param_scheduler"),
    (schedule("CosineAnnealingLR", T_max=2, eta_min=0, eta_min_ratio=0.1), "param_scheduler"),
    (schedule("OneCycleLR", eta_max=1.0, total_steps=0), "param_scheduler"),
    (schedule("OneCycleLR", eta_max=1.0, total_steps=4, pct_start=2), "param_scheduler"),
    (schedule("ReduceOnPlateauLR", factor=2.0), "param_scheduler"),
    (schedule("ReduceOnPlateauLR", rule="max"), "param_scheduler"),
    (schedule("StepLR", step_size=1, by="week"), "param_scheduler"),
    (schedule("StepLR", step_size=1, by="epoch", by_epoch=False), "param_scheduler"),
    (schedule("StepLR", step_size=1, last_step=-2), "param_scheduler"),
    (schedule("StepParamScheduler", param_name="betas2", step_size=1), "param_scheduler"),
    (schedule("CosineAnnealingLR", T_max=2, eta_min=[0.1, 0.2]), "param_scheduler"),
    ({**schedule("StepMomentum", step_size=1), **optim({"type": "Adagrad", "lr": 0.1})}, "param_scheduler"),
    ({**schedule("StepLR", step_size=1, end=4), "train_cfg": ITERS}, "param_scheduler"),
    ({**schedule("StepLR", step_size=1), "train_cfg": ITERS}, "param_scheduler"),
    ({"param_scheduler": 5}, "param_scheduler"),
    # hooks
    (hooks(logger={"interval": 0}), "default_hooks.logger.interval"),
    *[(hooks(logger={"interval": value}), "default_hooks.logger.interval") for value in (True, "10", 2.5)],
    *[
        (hooks(checkpoint={"interval": value}), "default_hooks.checkpoint.interval")
        for value in (0, -2, "1", 1.5, True)
    ],
    (hooks(checkpoint={"keep_every": 1.5}), "default_hooks.checkpoint.keep_every"),
    (hooks(checkpoint={"filename_tmpl": "last.pth"}), "default_hooks.checkpoint.filename_tmpl"),
    (hooks(nonfinite={"policy": "wait"}), "default_hooks.nonfinite.policy"),
    (hooks({**EMA, "interval": 0}), "custom_hooks"),
    (hooks({**EMA, "momentum": 2.0}), "custom_hooks"),
    (hooks({**EMA, "ema_type": "Mean"}), "custom_hooks"),
    (hooks({**EMA, "begin_iter": -1}), "custom_hooks.0.begin_iter"),
    (hooks(EMA, {**EMA, "momentum": 0.1}), "custom_hooks"),
    ({**hooks({**EMA, "begin_epoch": 2}), "train_cfg": ITERS}, "custom_hooks"),
    (hooks({**STOP, "rule": "less"}, {**STOP, "rule": "less", "patience": 9}), "custom_hooks"),
    (hooks({"type": Counting}, {"type": Counting}), "custom_hooks"),
    (hooks({"type": "GarbageCollectionHook", "interval": 0}), "custom_hooks"),
    (hooks({"type": "FlopsHook", "peak_flops": -1.0}), "custom_hooks"),
    (hooks({"type": "ProfilerHook", "warmup": 0}), "custom_hooks"),
    ({"env_cfg": {"float32_matmul_precision": "tf32"}}, "env_cfg"),
    ({"env_cfg": {"cudnn_allow_tf32": "no"}}, "env_cfg"),
    (hooks(*[{"type": Renamed, "name": name, "state_key": "a"} for name in "bc"]), "custom_hooks"),
    (hooks(Renamed("a"), {"type": Renamed, "name": "b", "state_key": "a"}), "custom_hooks"),
    (hooks({"type": Counting, "state_key": 3}), "custom_hooks"),
    (hooks(5), "custom_hooks"),
    # evaluators
    (evaluator({"type": "Accuracy", "task": "multi"}), "val_evaluator"),
    (evaluator({"type": "Accuracy", "task": "multiclass"}), "val_evaluator"),
    (evaluator([ACCURACY, ACCURACY]), "val_evaluator"),
    (evaluator({"type": "Evaluator", "metrics": [ACCURACY, ACCURACY]}), "val_evaluator"),
    (evaluator({"top": {**ACCURACY, "average": "bogus"}}), "val_evaluator"),
    (evaluator({}), "val_evaluator"),
    (evaluator(5), "val_evaluator"),
    (evaluator([5]), "val_evaluator"),
    # the process
    ({"launcher": "torchrun"}, "launcher"),
    ({"env_cfg": {"dist_cfg": {"backend": "ncl"}}}, "env_cfg"),
    ({"env_cfg": {"dist_cfg": {"timeout": 0}}}, "env_cfg"),
    ({"env_cfg": {"dist_cfg": {"timeout": "10"}}}, "env_cfg"),
    ({"env_cfg": {"dist_cfg": 5}}, "env_cfg"),
    ({"env_cfg": {"mp_cfg": {"mp_start_method": "thread"}}}, "env_cfg"),
    ({"env_cfg": {"mp_cfg": {"opencv_num_threads": -1}}}, "env_cfg"),
    ({"env_cfg": {"resource_limit": -1}}, "env_cfg"),
    ({"env_cfg": 5}, "env_cfg"),
    *[({"randomness": {"seed": value}}, "randomness") for value in (-1, 2**32, "1", 1.5, True)],
    ({"randomness": 5}, "randomness"),
    ({"compile": "yes"}, "compile"),
    ({"compile": {"mode": "fastest"}}, "compile.mode"),
    ({"compile": {"backend": "fastest"}}, "compile.backend"),
    ({"requeue": 1}, "requeue"),
    ({"report": "report.html"}, "report"),
    ({"work_dir": 5}, "work_dir"),
    ({"work_dir": "a\0b"}, "work_dir"),
    ({"experiment_name": 5}, "experiment_name"),
    ({"log_level": "LOUD"}, "log_level"),
    ({"auto_scale_lr": {"enable": True, "base_batch_size": 0}}, "auto_scale_lr"),
    # resuming
    ({"resume": "a", "load_from": "b"}, "resume"),
    ({"resume": 5}, "resume"),
    ({"load_from": 5}, "load_from"),
    ({"resume_optimizer": "no"}, "resume_optimizer"),
    ({"resume_param_scheduler": "no"}, "resume_param_scheduler"),
    ({"new_parameters": "head"}, "new_parameters"),
    ({"new_parameters": ["("]}, "new_parameters"),
    # strategies
    ({"strategy": 5}, "strategy"),
    (strategy("SingleDevice", buffers="rank1"), "strategy.buffers"),
    (strategy("SingleDevice", auto_scale_lr={"enable": True}), "strategy.auto_scale_lr"),
    (strategy("SingleDevice", env_kwargs={"bogus": 1}), "strategy"),
    (strategy("SingleDevice", log_kwargs={"bogus": 1}), "strategy"),
    (strategy("DDP", model_wrapper="half"), "strategy.model_wrapper"),
    (strategy("DDP", model_wrapper=5), "strategy.model_wrapper"),
    (strategy("DDP", sync_bn="apex"), "strategy.sync_bn"),
    (strategy("DDP", ddp_kwargs={"bogus": 1}), "strategy"),
    (strategy("DDP", ddp_kwargs=5), "strategy.ddp_kwargs"),
    (strategy("FSDP", mixed_precision="float8"), "strategy.mixed_precision"),
    (strategy("FSDP", mixed_precision={"dtype": "bf16"}), "strategy.mixed_precision"),
    (strategy("FSDP", replicate=0), "strategy.replicate"),
    (strategy("FSDP", tp=True), "strategy.tp"),
    (strategy("FSDP", tp_plan={"a": "colwise"}), "strategy"),
    (strategy("FSDP", tp=2, tp_plan={"a": "diagonal"}), "strategy.tp_plan"),
    (strategy("FSDP", wrap_policy={"size": 1}), "strategy.wrap_policy"),
    (strategy("FSDP", wrap_policy={"min_params": 0}), "strategy.wrap_policy"),
    (strategy("FSDP", wrap_policy=5), "strategy.wrap_policy"),
    (strategy("FSDP", activation_checkpointing={"policy": 5}), "strategy.activation_checkpointing"),
    (strategy("FSDP", activation_checkpointing={"save_ops": ["matmull"]}), "strategy.activation_checkpointing"),
    (strategy("FSDP", reshard_after_forward="yes"), "strategy.reshard_after_forward"),
    (strategy("FSDP", forward_prefetch=-1), "strategy.forward_prefetch"),
    (strategy("FSDP", matrix_updates="owner"), "strategy.matrix_updates"),
    (strategy("FSDP", cpu_offload=1), "strategy.cpu_offload"),
    (strategy("FSDP", ignored="a"), "strategy.ignored"),
    (strategy("FSDP", initial_weights="rank1"), "strategy.initial_weights"),
    (strategy("FSDP", sync_bn="apex"), "strategy.sync_bn"),
    (strategy("FSDP", compile_blocks="yes"), "strategy.compile_blocks"),
    (strategy("FSDP", state="half"), "strategy.state"),
    (strategy("FSDP", state="full", state_dict_cfg="full"), "strategy"),
    (strategy("FSDP", model_wrapper={"sharding_strategy": "NO_SHARD"}), "strategy.model_wrapper"),
    (strategy("FSDP", find_unused_parameters=True), "strategy.find_unused_parameters"),
    (strategy("DeepSpeed", zero_optimization={"stage": 4}), "strategy.zero_optimization"),
    (strategy("DeepSpeed", zero_optimization={"stge": 1}), "strategy"),
    (strategy("DeepSpeed", zero_optimization=5), "strategy.zero_optimization"),
    (strategy("DeepSpeed", zero_optimization={"stage": 0, "offload_optimizer": {"device": "cpu"}}), "strategy"),
    (strategy("DeepSpeed", config={"zero_optimisation": {}}), "strategy.config"),
    (strategy("DeepSpeed", config={"scheduler": {"type": "WarmupLR"}}), "strategy.config"),
    (strategy("DeepSpeed", config="missing.json"), "strategy.config"),
    (strategy("DeepSpeed", config={"bf16": {"enabled": True}}, bf16=False), "strategy"),
    (strategy("DeepSpeed", bf16=True, fp16=True), "strategy"),
    (strategy("DeepSpeed", gradient_clipping=-1), "strategy.gradient_clipping"),
    (strategy("DeepSpeed", gradient_accumulation_steps=0), "strategy.gradient_accumulation_steps"),
    (strategy("DeepSpeed", train_micro_batch_size_per_gpu=1.5), "strategy.train_micro_batch_size_per_gpu"),
    (strategy("DeepSpeed", inputs_to_half=[0]), "strategy.inputs_to_half"),
    (strategy("DeepSpeed", checkpoint_format="json"), "strategy.checkpoint_format"),
    (strategy("DeepSpeed", exclude_frozen_parameters=True), "strategy"),
    (strategy("DeepSpeed", amp={"enabled": True}), "strategy.amp"),
    (strategy("ColossalAI", plugin="zero"), "strategy.plugin"),
    (strategy("ColossalAI", plugin="gemini"), "strategy.plugin"),
    (strategy("ColossalAI", plugin={"stage": 1}), "strategy.plugin"),
    (strategy("ColossalAI", plugin={"type": "lowlevel-zero", "stage": 3}), "strategy.plugin"),
    (strategy("ColossalAI", plugin={"type": "lowlevel-zero", "stge": 1}), "strategy.plugin"),
    (strategy("ColossalAI", plugin={"type": "hybrid-parallel", "pp_size": 2}), "strategy.plugin"),
    (strategy("ColossalAI", plugin={"type": "hybrid-parallel", "zero_stage": 1}), "strategy.plugin"),
    (strategy("ColossalAI", plugin={"type": "lowlevel-zero", "precision": "bf16"}, mixed_precision="fp16"), "strategy"),
    (strategy("ColossalAI", mixed_precision="fp8"), "strategy.mixed_precision"),
    (strategy("ColossalAI", mixed_precision={"type": "bf16", "init_scale": 2}), "strategy.mixed_precision"),
    (strategy("ColossalAI", plugin="torch-ddp", mixed_precision="bf16"), "strategy"),
    (strategy("ColossalAI", checkpoint_format="json"), "strategy.checkpoint_format"),
    (strategy("ColossalAI", config={"a": 1}), "strategy.config"),
]


def configuration(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a valid configuration with changes, without values that are None."""
    values = settings(**{"work_dir": str(folder), **changes})
    return {key: value for key, value in values.items() if value is not None}


def building_error(cfg: dict[str, Any]) -> Exception:
    """Return the error of building and training without a previous check of the configuration."""
    runner = None
    try:
        runner = Runner(**cfg)
        runner.train()
    except Exception as error:  # noqa: BLE001 -- the test compares it
        return error
    finally:
        if runner is not None:
            runner.close()
    raise AssertionError("Building raised no error.")


@pytest.mark.parametrize(
    ("muon", "path", "message"),
    [
        ({"lr": 0.02}, "optim_wrapper.optimizer.parts.muon", "the key 'type', which names a optimizer, is missing"),
        ({"type": "Muon", "lrr": 0.02}, "optim_wrapper.optimizer.parts.muon.lrr", "Did you mean 'lr'?"),
        ({"type": "Moun"}, "optim_wrapper.optimizer.parts.muon.type", "Did you mean 'Muon'?"),
    ],
)
def test_a_misspelled_key_of_a_part_is_found(tmp_path: Path, muon: dict[str, Any], path: str, message: str) -> None:
    """The keys of each part of a mixed optimizer are checked like those of a single optimizer."""
    (problem,) = check_run(Config(configuration(tmp_path, _mixed(parts={**MIXED["parts"], "muon": muon}))))
    assert problem.path == path
    assert message in problem.message


@pytest.mark.parametrize(("changes", "path"), REFUSED, ids=[f"{path}-{i}" for i, (_, path) in enumerate(REFUSED)])
def test_the_check_has_the_message_of_building(tmp_path: Path, changes: dict[str, Any], path: str) -> None:
    """A value that building rejects is one problem with the same message and class of error, located by its key."""
    cfg = configuration(tmp_path, changes)
    problems = check_run(Config(cfg))
    error = building_error(cfg)
    assert len(problems) == 1, problems
    (problem,) = problems
    assert str(error) in problem.message
    assert problem.path.startswith(path)
    assert isinstance(error, StratagemError) <= (problem.error is type(error))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({**VALIDATION, "val_cfg": [1]}, "val_cfg"),
        ({"custom_hooks": 5}, "custom_hooks"),
        ({"default_hooks": [EMA]}, "default_hooks"),
        (evaluator({**ACCURACY, "bogus": 1}), "val_evaluator.bogus"),
    ],
)
def test_the_check_refuses_wrong_containers_and_arguments(tmp_path: Path, changes: dict[str, Any], path: str) -> None:
    """A value of a wrong type, and an unknown argument of a metric, is rejected by the check and by building."""
    cfg = configuration(tmp_path, changes)
    (problem,) = check_run(Config(cfg))
    assert problem.path.startswith(path)
    building_error(cfg)


def under(kind: str, wrapper: Any, **options: Any) -> dict[str, Any]:
    """Return the changes that set a strategy and an optimizer wrapper."""
    return {**strategy(kind, **options), "optim_wrapper": wrapper}


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (under("DeepSpeed", {"optimizer": SGD}, config={"optimizer": {"type": "Adam"}}), "Omit one of them"),
        (
            under("DeepSpeed", {"optimizer": SGD, "accumulative_counts": 2}, gradient_accumulation_steps=4),
            "make them equal",
        ),
        (
            under("DeepSpeed", {"optimizer": SGD, "clip_grad": {"max_norm": 1}}, gradient_clipping=2.0),
            "make them equal",
        ),
        (under("DeepSpeed", {}, config={"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}), "is 'auto'"),
        (under("DeepSpeed", {}, config={"optimizer": {"type": "Adam", "params": {"lr": -1}}}), "Invalid learning rate"),
        (under("DeepSpeed", {"type": "AmpOptimWrapper", "optimizer": SGD}), "requires an OptimWrapper"),
        (under("DeepSpeed", {"optimizer": SGD, "clip_grad": {"type": "value", "clip_value": 1}}), "2-norm"),
        (under("DeepSpeed", {"optimizer": {"type": "LBFGS"}}), "LBFGS cannot be used"),
        (under("DeepSpeed", {"optimizer": {"type": "Adafactor"}}, zero_optimization={"stage": 1}), "Adafactor"),
        (under("ColossalAI", {"type": "AmpOptimWrapper", "optimizer": SGD}), "AmpOptimWrapper"),
        (under("ColossalAI", {"optimizer": SGD, "clip_grad": {"max_norm": 1, "norm_type": 1}}), "norm_type=1"),
        (
            under(
                "ColossalAI",
                {"optimizer": SGD, "clip_grad": {"max_norm": 1}},
                plugin={"type": "lowlevel-zero", "max_norm": 2},
            ),
            "Specify only one",
        ),
        (under("ColossalAI", {"optimizer": {"type": "Adafactor"}}), "Adafactor requires whole parameters"),
        (
            under(
                "ColossalAI",
                {"optimizer": {"type": "Adafactor"}},
                plugin={"type": "hybrid-parallel", "tp_size": 2, "precision": "fp32"},
            ),
            "Adafactor requires whole parameters, but under tensor parallelism",
        ),
        (
            {**strategy("DeepSpeed", checkpoint_format="deepspeed"), **hooks(checkpoint={"async_save": True})},
            "cannot be written in the background",
        ),
        (
            {**strategy("ColossalAI", checkpoint_format="colossalai"), **hooks(checkpoint={"async_save": True})},
            "cannot be written in the background",
        ),
        (
            {**strategy("DeepSpeed", bf16=True), **hooks(EMA)},
            "needs the master weights in the model, but DeepSpeedStrategy",
        ),
        ({**strategy("FSDP", tp=2), "randomness": {"diff_rank_seed": True}}, "Omit diff_rank_seed"),
        (
            {
                "train_cfg": {"max_steps": 2},
                "optim_wrapper": {"constructor": "MultiOptimWrapperConstructor", "linear": {"optimizer": SGD}},
            },
            "max_steps requires a single optimizer",
        ),
    ],
)
def test_the_check_refuses_what_only_a_process_group_could_build(
    tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    """Options of an engine that do not fit the optimizer wrapper are rejected before any process is started."""
    (problem,) = check_run(Config(configuration(tmp_path, changes)))
    assert fragment in problem.message


@pytest.mark.parametrize(
    "changes",
    [
        {"train_dataloader": None, "train_cfg": None, "optim_wrapper": None, **TEST},
        VALIDATION,
        train(val_begin=2, val_interval=2, dynamic_intervals=[(1, 1)], uneven_data="shortest"),
        data(dataset={"type": "StreamOfCheck"}, num_workers=2, persistent_workers=True, prefetch_factor=4),
        data(sampler={"type": "WeightedSampler", "weights": [1.0] * 99}),
        data(batch_sampler={"type": "GroupedBatchSampler", "groups": "missing", "batch_size": 4}),
        optim(type="AmpOptimWrapper", loss_scale=512.0),
        optim({"type": "Muon", "lr": 0.1}),
        optim({"type": "OptimizerOfCheck", "lr": -1.0}, implementation="fused"),
        {
            **optim({"type": "OptimizerOfCheck", "lr": 1.0}),
            **schedule("StepParamScheduler", param_name="x", step_size=1),
        },
        {
            **optim(paramwise_cfg={"bias_lr_mult": 2.0}),
            **schedule("CosineAnnealingLR", T_max=2, eta_min=[0.1, 0.2]),
        },
        schedule("StepLR", step_size=1, convert_to_iter_based=True, verbose=True),
        {**schedule("LinearLR", by_epoch=False, begin=900, start_factor=0.1), **train(max_epochs=1)},
        {**schedule("LinearLR", by_epoch=False, start_factor=0.1), "train_cfg": {"max_steps": 10}},
        hooks({"type": Renamed, "name": "a"}, {"type": Renamed, "name": "b"}),
        hooks({"type": Counting}, {"type": Counting, "state_key": "second"}),
        hooks({**STOP, "rule": "less"}, {**STOP, "rule": "less", "state_key": "second"}),
        hooks({**EMA, "begin_epoch": 2}, checkpoint={"interval": -1}),
        {"launcher": "slurm"},
        data(streams="always"),
        {**strategy("DeepSpeed", zero_optimization={"stage": 2}), **hooks(EMA, checkpoint={"async_save": True})},
        strategy("DDP", find_unused_parameters=True, sync_bn="torch", model_wrapper="separate"),
        strategy("FSDP", mixed_precision="bfloat16", tp=2, wrap_policy="Block", activation_checkpointing=True),
        under("DeepSpeed", {"optimizer": ADAM}, zero_optimization={"stage": 2}, bf16=True),
        under("DeepSpeed", {}, config={"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, gradient_clipping=1.0),
        under("DeepSpeed", {"optimizer": {"type": "OptimizerOfCheck", "lr": 1}}, zero_optimization={"stage": 2}),
        under("ColossalAI", {"optimizer": ADAM, "clip_grad": {"max_norm": 1}}, mixed_precision="bf16"),
        {"compile": {"target": "anything", "mode": "reduce-overhead"}},
        {"resume": "a", "new_parameters": ["head.*"], "resume_optimizer": False},
    ],
)
def test_the_check_accepts_what_depends_on_the_data_the_model_or_the_machine(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The check does not reject values whose validity it cannot know, and does not build objects of other packages."""
    assert check_run(Config(configuration(tmp_path, changes))) == []


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    """The check creates no folder, draws no random numbers, and changes neither built optimizers nor the environment."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(Toy().parameters(), lr=0.1)
    before, groups = torch.get_rng_state(), [dict(group) for group in optimizer.param_groups]
    changes = {**VALIDATION, "optim_wrapper": optimizer, **schedule("LinearLR", start_factor=0.5, end=2, verbose=True)}
    assert check_run(Config(configuration(tmp_path / "new", changes))) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        (schedule("LinearLR", start_factor=3, end=2), "param_scheduler.0.start_factor"),
        ({"env_cfg": {"dist_cfg": {"timeout": -1}}, "launcher": "none"}, "env_cfg.dist_cfg.timeout"),
        ({"env_cfg": {"resource_limit": 9}, "launcher": "torchrun"}, "launcher"),
        (evaluator({"top": {**ACCURACY, "num_classes": 0}}), "val_evaluator.top.num_classes"),
        ({**schedule("StepLR", step_size=1, end=4), "train_cfg": ITERS}, "param_scheduler"),
    ],
)
def test_the_path_is_that_of_the_innermost_key_in_the_message(
    tmp_path: Path, changes: dict[str, Any], path: str
) -> None:
    """A problem is located at the key that the message mentions, even if several sections are checked together."""
    (problem,) = check_run(Config(configuration(tmp_path, changes)))
    assert problem.path == path


def test_a_single_problem_raises_the_class_of_the_error_of_building(tmp_path: Path) -> None:
    """``Runner.from_cfg`` raises the same class as ``Runner`` for a single invalid value."""
    with pytest.raises(ConfigValueError, match="max_epochs"):
        Runner.from_cfg(configuration(tmp_path, train(max_epochs=0)))
    with pytest.raises(LaunchError, match="Unknown launcher 'torchrun'"):
        Runner.from_cfg(configuration(tmp_path, {"launcher": "torchrun"}))
