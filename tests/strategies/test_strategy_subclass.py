"""A custom strategy requires only four methods and an entry in the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from stratagem.registry import STRATEGIES
from stratagem.strategies import BaseStrategy, DDPStrategy, SingleDeviceStrategy
from tests.support.small_runs import Line, train


class PlainStrategy(BaseStrategy):
    """A minimal strategy that keeps checkpoints in memory."""

    saved: dict[str, Any]

    def prepare(
        self,
        model: Any,
        *,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        compile: Any = False,
        dispatch_kwargs: Any = None,
    ) -> Any:
        self.dispatch_kwargs.update(dispatch_kwargs or {})
        self.model = self.compile_model(self._init_model_weights(self.build_model(model)), compile)
        if optim_wrapper is not None:
            self.optim_wrapper = self.build_optim_wrapper(optim_wrapper, self.model)
            self._scale_lr()
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        return self._prepared_components()

    def save_checkpoint(self, filename: Any, **kwargs: Any) -> None:
        self.saved = {
            "model": {name: value.clone() for name, value in self.model_state_dict().items()},
            "schedulers": self.scheduler_state_dict(),
        }

    def load_checkpoint(self, filename: Any, **kwargs: Any) -> dict[str, Any]:
        self.load_model_state_dict(self.saved["model"])
        return {"from": "memory"}

    def resume(self, filename: Any, **kwargs: Any) -> dict[str, Any]:
        self.load_scheduler_state_dict(self.saved["schedulers"])
        return self.load_checkpoint(filename)


def test_a_custom_strategy_can_be_built_by_name(tmp_path: Path) -> None:
    """A custom strategy inherits building, state and load_or_resume."""
    STRATEGIES.register_module(name="PlainStrategyHere", module=PlainStrategy, force=True)
    strategy = STRATEGIES.build({"type": "PlainStrategyHere", "work_dir": str(tmp_path), "auto_scale_lr": None})
    model, optim, (scheduler,) = strategy.prepare(
        Line(),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 1.0}},
        param_scheduler={"type": "ConstantLR", "factor": 0.5, "end": 2, "by_epoch": False},
    )
    assert strategy.unwrap_model() is model
    assert optim.get_lr() == {"lr": [0.5]}
    strategy.save_checkpoint("memory")
    train(strategy, [model.weight.new_ones(1)] * 2)
    assert (model.weight.item(), scheduler.position) == (2.0 - 0.5 - 1.0, 2)
    assert strategy.load_or_resume(resume="memory") == {"from": "memory"}
    assert (model.weight.item(), scheduler.position) == (2.0, 0)
    strategy.close()


def test_the_base_class_is_abstract() -> None:
    """The error for instantiating the base class lists the four abstract methods."""
    with pytest.raises(TypeError, match=r"load_checkpoint.*prepare.*resume.*save_checkpoint"):
        BaseStrategy()  # type: ignore[abstract]
    assert BaseStrategy.__abstractmethods__ == {"prepare", "load_checkpoint", "resume", "save_checkpoint"}


@pytest.mark.parametrize(
    ("name", "kind"), [("SingleDeviceStrategy", SingleDeviceStrategy), ("DDPStrategy", DDPStrategy)]
)
def test_the_strategies_are_registered(name: str, kind: type[BaseStrategy]) -> None:
    """Strategies are registered under the names used in configurations."""
    assert STRATEGIES.get(name) is kind


def test_a_strategy_can_be_built_from_a_configuration(tmp_path: Path) -> None:
    """A strategy and a model can be built from configurations."""
    strategy = STRATEGIES.build({"type": "SingleDeviceStrategy", "work_dir": str(tmp_path)})
    assert isinstance(strategy.prepare({"type": "Linear", "in_features": 1, "out_features": 1}), nn.Linear)
    strategy.close()
