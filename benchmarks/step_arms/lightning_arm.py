"""The job with Lightning's `Trainer` and everything that is on by default.

These are the CSV logger, the progress bar, the model summary and the checkpoint callback. `self.log` records the loss.
"""

from __future__ import annotations

import tempfile
from typing import Any, final

import lightning
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from step_arms.gate import Gate
from step_arms.jobs import LOG_INTERVAL, SCHEDULE_STEPS, Job, make_loader

__all__ = ["train"]


def train(job: Job, gate: Gate, rank: int) -> None:
    """Train until the gate stops; Lightning reads the rank from the environment."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=job.ranks,
            strategy="ddp" if job.ranks > 1 else "auto",
            max_epochs=1,
            accumulate_grad_batches=job.accumulation,
            gradient_clip_val=job.clip,
            use_distributed_sampler=False,  # it would shuffle
            log_every_n_steps=LOG_INTERVAL // job.accumulation,  # counts updates
        )
        trainer.fit(_Module(job, gate), make_loader(job, rank))


@final
class _Module(lightning.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self, job: Job, gate: Gate) -> None:
        super().__init__()
        self._job = job
        self._gate = gate
        self.network = job.model()
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        self._gate.tick()
        inputs, targets = batch
        loss: Tensor = self.loss(self.network(inputs), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, which steps with each update."""
        optimizer = self._job.make_optimizer(self.network)
        scheduler = CosineAnnealingLR(optimizer, T_max=SCHEDULE_STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
