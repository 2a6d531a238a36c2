"""The job with the `Trainer` of Hugging Face transformers and its default callbacks.

These are the flow control, the progress bar and the records of the losses. Clipping, which is on by default, and saving every
500 steps are switched off where the job does not have them.
"""

from __future__ import annotations

import tempfile
from typing import Any, final

from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from step_arms.gate import Gate
from step_arms.jobs import LOG_INTERVAL, SCHEDULE_STEPS, Job

__all__ = ["train"]


def train(job: Job, gate: Gate, _rank: int) -> None:
    """Train until the gate stops; the arguments of the trainer read the rank from the environment."""
    model = _Model(job, gate)
    optimizer = job.make_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=SCHEDULE_STEPS,
            per_device_train_batch_size=job.batch_size,
            gradient_accumulation_steps=job.accumulation,
            max_grad_norm=job.clip or 0.0,
            train_sampling_strategy="sequential",
            dataloader_num_workers=job.workers,
            logging_steps=max(1, LOG_INTERVAL // job.accumulation),  # counts updates
            save_strategy="no",
            ddp_backend="gloo" if job.ranks > 1 else None,
        )
        Trainer(
            model,
            arguments,
            data_collator=_collate,
            train_dataset=job.dataset(),
            optimizers=(optimizer, CosineAnnealingLR(optimizer, T_max=SCHEDULE_STEPS)),
        ).train()


def _collate(samples: Any) -> dict[str, Tensor]:
    inputs, labels = default_collate(samples)
    return {"inputs": inputs, "labels": labels}


@final
class _Model(nn.Module):
    """The network with its loss."""

    def __init__(self, job: Job, gate: Gate) -> None:
        super().__init__()
        self._gate = gate
        self.network = job.model()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss and the outputs."""
        self._gate.tick()
        outputs = self.network(inputs)
        return {"loss": self.loss(outputs, labels), "logits": outputs}
