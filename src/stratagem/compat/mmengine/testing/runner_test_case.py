"""A test case that builds runners of a small training."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any, ClassVar
from unittest import TestCase

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.evaluator import BaseMetric
from stratagem.compat.mmengine.logging import MessageHub, MMLogger
from stratagem.compat.mmengine.model import BaseModel
from stratagem.compat.mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope
from stratagem.compat.mmengine.runner import Runner
from stratagem.compat.mmengine.visualization import Visualizer
from stratagem.distributed import close_dist

__all__ = ["RunnerTestCase", "ToyDataset", "ToyMetric", "ToyModel"]

_NUM_SAMPLES = 12


class ToyModel(BaseModel):
    """Two linear layers with 2 inputs and 1 output."""

    def __init__(self, data_preprocessor: Any = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.linear1 = nn.Linear(2, 2)
        self.linear2 = nn.Linear(2, 1)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        inputs, data_samples = _stacked(inputs), _stacked(data_samples)
        outputs = self.linear2(self.linear1(inputs))
        return {"loss": (data_samples - outputs).sum()} if mode == "loss" else outputs


class ToyDataset(Dataset[dict[str, Tensor]]):
    """Twelve random samples with the label 1."""

    METAINFO: ClassVar[dict[str, Any]] = {}
    data = torch.randn(_NUM_SAMPLES, 2)
    label = torch.ones(_NUM_SAMPLES)

    @property
    def metainfo(self) -> dict[str, Any]:
        """The meta information of the dataset."""
        return self.METAINFO

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.data[index], "data_samples": self.label[index]}


class ToyMetric(BaseMetric):
    """A metric that is always 1."""

    def __init__(self, collect_device: str = "cpu", dummy_metrics: Any = None) -> None:
        super().__init__(collect_device=collect_device)
        self.dummy_metrics = dummy_metrics

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append({"acc": 1})

    def compute_metrics(self, results: Any) -> dict[str, float]:
        return {"acc": 1}


class RunnerTestCase(TestCase):
    """A test case with ``epoch_based_cfg`` and ``iter_based_cfg``, the configurations of a small training.

    The work directory is temporary. ``ToyModel``, ``ToyDataset`` and ``ToyMetric`` are registered while a test runs, and no
    named instances are left after it.
    """

    dist_cfg: ClassVar[dict[str, Any]] = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29600,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    _classes: ClassVar[tuple[tuple[Any, Any], ...]] = (
        (MODELS, ToyModel),
        (METRICS, ToyMetric),
        (DATASETS, ToyDataset),
    )
    epoch_based_cfg: Config
    iter_based_cfg: Config

    def setUp(self) -> None:
        self.temp_dir = tempfile.TemporaryDirectory()
        for registry, item in self._classes:
            registry.register_module(module=item, force=True)
        self.epoch_based_cfg = Config(_epoch_based(self.temp_dir.name))
        self.iter_based_cfg = copy.deepcopy(self.epoch_based_cfg)
        self.iter_based_cfg.train_dataloader = _loader("InfiniteSampler", shuffle=True)
        self.iter_based_cfg.log_processor = {"by_epoch": False}
        self.iter_based_cfg.train_cfg = {"by_epoch": False, "max_iters": 12}
        self.iter_based_cfg.default_hooks = {
            "logger": {"type": "LoggerHook", "interval": 1},
            "checkpoint": {"type": "CheckpointHook", "interval": 12, "by_epoch": False},
        }

    def tearDown(self) -> None:
        logging.shutdown()
        for kind in (MMLogger, Visualizer, DefaultScope, MessageHub):
            kind._instance_dict.clear()
        for registry, item in self._classes:
            registry.module_dict.pop(item.__name__, None)
        self.temp_dir.cleanup()
        close_dist()

    def build_runner(self, cfg: Config) -> Runner:
        """Return the runner of a configuration, with a new name of the experiment."""
        cfg.experiment_name = self.experiment_name
        return Runner.from_cfg(cfg)

    @property
    def experiment_name(self) -> str:
        """A new name."""
        return f"{self._testMethodName}_{uuid.uuid4()}"

    def setup_dist_env(self) -> None:
        """Set the variables of the launcher ``pytorch`` for one process, with a new port."""
        self.dist_cfg["MASTER_PORT"] += 1
        os.environ.update({name: str(value) for name, value in self.dist_cfg.items()})

    def clear_work_dir(self) -> None:
        """Remove everything in the work directory."""
        logging.shutdown()
        for path in Path(self.temp_dir.name).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _epoch_based(work_dir: str) -> dict[str, Any]:
    return {
        "work_dir": work_dir,
        "model": {"type": "ToyModel"},
        "train_dataloader": _loader("DefaultSampler", shuffle=True),
        "val_dataloader": _loader("DefaultSampler", shuffle=False),
        "val_evaluator": [{"type": "ToyMetric"}],
        "test_dataloader": _loader("DefaultSampler", shuffle=False),
        "test_evaluator": [{"type": "ToyMetric"}],
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
        "train_cfg": {"by_epoch": True, "max_epochs": 2, "val_interval": 1},
        "val_cfg": {},
        "test_cfg": {},
        "default_hooks": {"logger": {"type": "LoggerHook", "interval": 1}},
        "custom_hooks": [],
        "env_cfg": {"dist_cfg": {"backend": "nccl"}},
        "experiment_name": "test1",
    }


def _loader(sampler: str, *, shuffle: bool) -> dict[str, Any]:
    return {
        "dataset": {"type": "ToyDataset"},
        "sampler": {"type": sampler, "shuffle": shuffle},
        "batch_size": 3,
        "num_workers": 0,
    }


def _stacked(values: Any) -> Any:
    return torch.stack(values) if isinstance(values, list) else values
