"""The whole configuration of a run is checked before anything is built, so a misspelled key is found immediately."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stratagem.config import Config, Section, check, require
from stratagem.config_schema import SECTIONS
from stratagem.errors import ConfigKeyError
from stratagem.registry import DATASETS, TOKENIZERS
from stratagem.runner import _ARGUMENTS
from stratagem.strategies.setup.auto_scale import _KEYS as _SCALE_KEYS
from stratagem.strategies.setup.environment import _KEYS, _RANDOMNESS_KEYS
from stratagem.train.building import _DEFAULT_HOOKS

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/**/*config*.*"))


@DATASETS.register_module(name="NumbersOfSections")
class Numbers:
    """A dataset for these tests."""

    def __init__(self, length: int) -> None:
        self.length = length


@TOKENIZERS.register_module(name="LettersOfSections")
class Letters:
    """A tokenizer for these tests."""

    def __init__(self, *, capital: bool) -> None:
        self.capital = capital


NUMBERS = {"type": "NumbersOfSections", "length": 4}

# Every section with all of its documented keys; none of them accepts arbitrary values.
FULL: dict[str, Any] = {
    "model": {
        "type": "SupervisedModel",
        "network": [{"type": "Linear", "in_features": 4, "out_features": 2, "bias": True}, {"type": "ReLU"}],
        "loss": {"type": "CrossEntropyLoss", "label_smoothing": 0.1},
        "data_preprocessor": {"type": "BaseDataPreprocessor", "non_blocking": True},
    },
    "tokenizer": {"type": "LettersOfSections", "capital": False},
    "work_dir": "work_dirs/full",
    "experiment_name": "full",
    "train_dataloader": {
        "dataset": NUMBERS,
        "batch_size": 4,
        "num_workers": 0,
        "drop_last": True,
        "pin_memory": False,
        "sampler": {"type": "DefaultSampler", "shuffle": True, "round_up": True},
        "collate_fn": {"type": "default_collate"},
    },
    "train_cfg": {"by_epoch": True, "max_epochs": 2, "val_begin": 1, "val_interval": 1},
    "val_dataloader": {"dataset": NUMBERS, "batch_size": 4, "persistent_workers": False},
    "val_cfg": {},
    "val_evaluator": {"type": "Accuracy", "task": "multiclass", "num_classes": 2},
    "test_dataloader": {"dataset": NUMBERS, "batch_size": 4},
    "test_cfg": {},
    "test_evaluator": {"first": {"type": "Accuracy", "task": "multiclass", "num_classes": 2}},
    "optim_wrapper": {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        "accumulative_counts": 2,
        "clip_grad": {"max_norm": 1.0},
        "paramwise_cfg": {"norm_decay_mult": 0.0},
        "constructor": "DefaultOptimWrapperConstructor",
        "implementation": "auto",
    },
    "param_scheduler": [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 10},
        {"type": "CosineAnnealingLR", "T_max": 2, "eta_min": 0.0, "convert_to_iter_based": True},
    ],
    "strategy": {"type": "DDPStrategy", "find_unused_parameters": True, "sync_bn": "torch", "static_graph": False},
    "auto_scale_lr": {"enable": False, "base_batch_size": 8, "rule": "sqrt"},
    "default_hooks": {
        "runtime_info": {"type": "RuntimeInfoHook"},
        "timer": {"type": "IterTimerHook"},
        "sampler_seed": {"type": "DistSamplerSeedHook"},
        "logger": {"type": "LoggerHook", "interval": 10, "ignore_last": True, "window_size": 10},
        "param_scheduler": {"type": "ParamSchedulerHook"},
        "checkpoint": {
            "type": "CheckpointHook",
            "interval": 1,
            "by_epoch": True,
            "save_optimizer": True,
            "save_param_scheduler": True,
            "save_last": True,
            "filename_tmpl": "epoch_{}",
            "save_begin": 0,
            "max_keep_ckpts": 3,
            "keep_every": 10,
            "save_best": "acc",
            "rule": "greater",
            "greater_keys": ["acc"],
            "less_keys": ["loss"],
            "keep_best": 1,
            "published_keys": ["state_dict"],
            "every_minutes": 30.0,
            "async_save": True,
            "out_dir": "work_dirs/elsewhere",
        },
    },
    "custom_hooks": [{"type": "IterTimerHook", "priority": "LOW"}],
    "load_from": None,
    "resume": False,
    "launcher": "none",
    "env_cfg": {
        "cudnn_benchmark": False,
        "cudnn_allow_tf32": True,
        "float32_matmul_precision": "high",
        "mp_cfg": None,
        "dist_cfg": None,
        "resource_limit": 4096,
    },
    "log_level": "INFO",
    "randomness": {"seed": 1, "diff_rank_seed": False, "deterministic": False},
    "compile": {"target": "forward", "mode": "default", "dynamic": False},
    "default_scope": None,
}
# Values below these keys are passed to other code or are plain values.
BELOW = {"betas", "clip_grad", "paramwise_cfg", "first"}


def keys_of(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key that is checked."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "first":
                yield (*path, key)
            if key not in BELOW or key == "first":
                yield from keys_of(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from keys_of(value, (*path, index))


def misspellings(key: str) -> set[str]:
    """Return the key with one character dropped, two swapped, or one inserted or appended."""
    middle = len(key) // 2
    dropped = {key[:place] + key[place + 1 :] for place in range(len(key))}
    swapped = {key[:p] + key[p + 1] + key[p] + key[p + 2 :] for p in range(len(key) - 1)}
    return {
        wrong for wrong in (*dropped, *swapped, f"{key}s", f"{key[:middle]}x{key[middle:]}") if wrong not in {key, ""}
    }


def with_key(path: tuple[Any, ...], wrong: str) -> dict[str, Any]:
    """Return the full configuration with one misspelled key."""
    config = copy.deepcopy(FULL)
    node: Any = config
    for part in path[:-1]:
        node = node[part]
    node[wrong] = node.pop(path[-1])
    return config


@pytest.mark.slow
def test_the_full_configuration_has_no_problems() -> None:
    """A configuration with every documented key has no problems."""
    assert check(Config(FULL), SECTIONS) == []


@pytest.mark.slow
def test_every_misspelled_key_is_rejected_with_the_right_name() -> None:
    """At least 99 % of misspelled keys of the full configuration are rejected with the correct name.

    A key is misspelled by dropping, swapping or adding a character. The failure lists the keys that were missed.
    """
    tried, missed = 0, []
    for path in keys_of(FULL):
        for wrong in misspellings(path[-1]):
            config = with_key(path, wrong)
            if wrong in FULL or wrong == "vars":
                continue
            tried += 1
            problems = check(Config(config), SECTIONS)
            right = [
                p for p in problems if repr(path[-1]) in str(p) or re.search(rf"\b{re.escape(path[-1])}\b", str(p))
            ]
            if not right:
                missed.append((path, wrong, [str(problem) for problem in problems]))
    assert tried > 1000
    assert len(missed) <= tried // 100, missed[:20]


def test_all_problems_are_listed_at_once() -> None:
    """Three misspelled keys give one error that lists all of them with the closest names."""
    config = Config({**copy.deepcopy(FULL), "param_schedulers": [], "load_form": "x", "rezume": True})
    with pytest.raises(ConfigKeyError) as caught:
        require(config, SECTIONS)
    text = str(caught.value)
    assert "3 problems" in text
    for wrong, right in (("param_schedulers", "param_scheduler"), ("load_form", "load_from"), ("rezume", "resume")):
        assert re.search(rf"{wrong}.*'{right}'", text)


def test_an_override_of_an_unknown_key_is_rejected() -> None:
    """``--set`` with an unknown key is rejected like a key in a file, and the error shows the option."""
    config = Config(copy.deepcopy(FULL))
    config.merge_from_dict({"train_cfg.max_epoch": 3})
    with pytest.raises(ConfigKeyError, match=r"train_cfg\.max_epoch \(--set .*'max_epochs'"):
        require(config, SECTIONS)


def test_vars_accepts_arbitrary_values() -> None:
    """Values below ``vars`` are not checked."""
    assert check(Config({**copy.deepcopy(FULL), "vars": {"anything": [1, {"goes": 2}]}}), SECTIONS) == []


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.parent.name)
def test_every_example_has_no_problems(file: Path) -> None:
    """The configurations of the examples have no problems."""
    assert check(Config.fromfile(file), SECTIONS) == []


def test_the_schema_matches_the_engine() -> None:
    """The schema contains all arguments, default hooks and environment settings that the engine reads."""
    keys = {name: set(rule.keys) for name, rule in SECTIONS.items() if isinstance(rule, Section)}
    assert set(_ARGUMENTS) | {"runner_type", "tokenizer"} == set(SECTIONS)
    assert keys["default_hooks"] == set(_DEFAULT_HOOKS)
    assert keys["env_cfg"] == set(_KEYS) - {"launcher", "randomness"}
    assert keys["randomness"] == set(_RANDOMNESS_KEYS)
    assert keys["auto_scale_lr"] == set(_SCALE_KEYS)


class Delegating:
    """A constructor that passes its configuration to the wrapper, except for one key."""

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        self.factor = optim_wrapper_cfg.pop("own_factor", 1.0)
        self.cfg, self.paramwise_cfg = optim_wrapper_cfg, paramwise_cfg


SGD = {"type": "SGD", "lr": 0.1}


@pytest.mark.parametrize(
    ("data", "key", "text"),
    [
        (
            {"optim_wrapper": {"optimizer": SGD, "paramwise_cfg": {"norm_decay": 0.0}}},
            "paramwise_cfg",
            "norm_decay_mult",
        ),
        ({"optim_wrapper": {"optimizer": SGD, "paramwise_cfg": [1]}}, "paramwise_cfg", "must be a mapping"),
        ({"optim_wrapper": {"optimizer": SGD, "paramwise_cfg": {"match": "glob"}}}, "paramwise_cfg", "match='glob'"),
        (
            {"optim_wrapper": {"optimizer": SGD, "paramwise_cfg": {"layer_decay": {"rate": 1}}}},
            "paramwise_cfg",
            "requires layers",
        ),
        ({"optim_wrapper": {"optimizer": SGD, "implementation": "fast"}}, "implementation", "fused"),
        ({"optim_wrapper": {"optimizer": SGD, "constructor": Delegating, "clip_gradd": {}}}, None, None),
        ({"optim_wrapper": {"optimizer": SGD, "constructor": Delegating, "bogus": 1}}, "bogus", "no argument 'bogus'"),
        ({"optim_wrapper": {"constructor": Delegating, "gen": {"optimizer": SGD, "bogus": 1}}}, "gen.bogus", "bogus"),
        (
            {"optim_wrapper": {"constructor": "MultiOptimWrapperConstructor", "gen": {"optimizer": SGD, "bogus": 1}}},
            "gen.bogus",
            "no argument 'bogus'",
        ),
        (
            {"optim_wrapper": {"constructor": "MultiOptimWrapperConstructor", "gen": 1}},
            "optim_wrapper",
            "must be a mapping",
        ),
        ({"optim_wrapper": {"constructor": "MultiOptimWrapperConstructor"}}, "optim_wrapper", "at least one optimizer"),
        ({"train_cfg": {"by_epoch": False}}, "train_cfg", "set max_iters or max_steps"),
        ({"auto_scale_lr": {"enable": True}}, "auto_scale_lr", "base_batch_size"),
        ({"log_level": "LOUD"}, "log_level", "LOUD"),
        ({"env_cfg": {"mp_cfg": {"start": "fork"}}}, "env_cfg.mp_cfg.start", "mp_start_method"),
        ({"default_hooks": {"checkpoint": {"save_begin": -1}}}, "default_hooks.checkpoint", "save_begin >= 0"),
        ({"default_hooks": {"logger": {"interval": 0}}}, "default_hooks.logger", "interval >= 1"),
        ({"custom_hooks": [{"type": "EarlyStoppingHook", "monitor": "x"}]}, "custom_hooks.0", "rule='greater'"),
        ({"custom_hooks": [{"type": "EarlyStoppingHook", "monitor": "loss", "priority": "X"}]}, "priority", "'X'"),
    ],
)
def test_the_check_refuses_what_building_refuses(data: dict[str, Any], key: str | None, text: str | None):
    """The values that building validates are validated before anything is built, with the same messages."""
    problems = check(Config(data), SECTIONS)
    if key is None or text is None:
        assert problems == []  # a mapping can be the configuration of a part that the constructor builds
        return
    (problem,) = problems
    assert key in problem.path
    assert text in problem.message


def test_a_custom_constructor_may_have_its_own_keys_and_rules():
    """Keys that the source of the constructor contains are accepted, and its ``paramwise_cfg`` may have any keys."""
    wrapper = {"optimizer": SGD, "constructor": Delegating, "own_factor": 2.0, "paramwise_cfg": {"num_layers": 12}}
    assert check(Config({"optim_wrapper": wrapper}), SECTIONS) == []
