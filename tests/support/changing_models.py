"""Language models that freeze or unfreeze a parameter during a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
