"""Models that freeze or unfreeze a parameter during a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stratagem.errors import StratagemError
from stratagem.registry import STRATEGIES
from tests.support.backward_passes import batch, built, of_this_rank
from tests.support.sharded_runs import Gpt


class Unfreezing(Gpt):
    """Makes its frozen position embeddings trainable in its second training step."""

    num_steps = 0

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Count the steps."""
        self.num_steps += 1
        if self.num_steps == 2:
            self.places.requires_grad_(True)
        return super().train_step(data, optim_wrapper)


class Freezing(Gpt):
    """Freezes a layer in its second training step."""

    num_steps = 0

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Count the steps."""
        outputs = super().train_step(data, optim_wrapper)
        self.num_steps += 1
        if self.num_steps == 2:
            self.norm.requires_grad_(False)
        return outputs


class Unfrozen(Gpt):
    """All parameters are trainable from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.places.requires_grad_(True)


def change_in_a_manual_loop(strategy: Mapping[str, Any], folder: str, *, unfreeze: bool) -> str:
    """Train without ``train_step``, change a layer before the third forward pass, and return the error of that pass.

    The result is empty if there is no error.
    """
    with warnings.catch_warnings():
        # Ignore the warnings that the engines cause.
        warnings.simplefilter("ignore")
        placing: Any = STRATEGIES.build({"work_dir": folder, "log_kwargs": {"log_level": "ERROR"}, **strategy})
        try:
            original = built("one pass")
            original.a.requires_grad_(not unfreeze)
            optim = {"optimizer": {"type": "SGD", "lr": 0.1}}
            model, wrapper, *_ = placing.prepare(original, optim_wrapper=optim, dispatch_kwargs={"max_iters": 9})
            for iteration in range(2):
                wrapper.update_params(model(*of_this_rank(batch(iteration)))["near"])
            original.a.requires_grad_(unfreeze)
            try:
                wrapper.update_params(model(*of_this_rank(batch(2)))["near"])
            except StratagemError as error:
                return str(error)
            return ""
        finally:
            placing.close()
