"""The same training with a hand-written loop, Lightning, Accelerate and the Trainer of transformers, each recorded in a trace.

As a script, records the loops of the libraries on this rank of a torchrun launch: ``trace_loops.py FOLDER``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import stratagem

# Lightning imports torchvision if it is installed.
import tests.foreign.torchvision_ops  # noqa: F401

BATCH: Final = 16


class Points(Dataset):
    """Points in four dimensions with one of three classes."""

    def __len__(self) -> int:
        return 4 * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "inputs": torch.randn(4, generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }


class Classifier(nn.Module):
    """Two layers that return the loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss and the scores."""
        scores = self.layers(inputs)
        return {"loss": cross_entropy(scores, labels), "logits": scores}


def recording(path: Path | None, model: nn.Module) -> Any:
    """Return a recording of the model, or a context without effect if there is no path."""
    return nullcontext() if path is None else stratagem.trace.record(path, model)


def by_hand(path: Path | None, *, ranks: int = 1, lr: float = 0.1, clip: float = 0.5) -> nn.Module:
    """Train with a hand-written loop, in one process."""
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with recording(path, model):
        for batch in DataLoader(Points(), batch_size=BATCH):
            model(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def with_lightning(path: Path | None, *, ranks: int = 1, lr: float = 0.1, clip: float = 0.5) -> nn.Module:
    """Train with Lightning."""
    import lightning

    class Module(lightning.LightningModule):
        """The classifier as a LightningModule."""

        def __init__(self) -> None:
            super().__init__()
            self.network = Classifier()

        def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
            """Return the loss."""
            return self.network(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """Return the optimizer."""
            return torch.optim.SGD(self.parameters(), lr=lr)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        gradient_clip_val=clip,
        # Lightning's own sampler shuffles on several ranks.
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sampler = DistributedSampler(Points(), shuffle=False) if ranks > 1 else None
    with recording(path, module):
        trainer.fit(module, DataLoader(Points(), batch_size=BATCH // ranks, sampler=sampler))
    return module.network


def with_accelerate(
    path: Path | None, *, ranks: int = 1, lr: float = 0.1, clip: float = 0.5, reduces: bool = True
) -> nn.Module:
    """Train with Accelerate; without ``reduces``, the gradients of the ranks are not averaged."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    inner = Classifier()
    model, optimizer, loader = accelerator.prepare(
        inner, torch.optim.SGD(inner.parameters(), lr=lr), DataLoader(Points(), batch_size=BATCH // ranks)
    )
    with recording(path, model):
        for batch in loader:
            with nullcontext() if reduces else model.no_sync():
                accelerator.backward(model(**batch)["loss"])
            accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return inner


def with_trainer(path: Path | None, *, ranks: int = 1, lr: float = 0.1, clip: float = 0.5) -> nn.Module:
    """Train with the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments

    model = Classifier()
    arguments = TrainingArguments(
        str(path or "unused"),
        per_device_train_batch_size=BATCH // ranks,
        num_train_epochs=1,
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=clip,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    with recording(path, model):
        Trainer(model, arguments, train_dataset=Points()).train()
    return model


LIBRARIES: Final[Mapping[str, Callable[..., nn.Module]]] = {
    "lightning": with_lightning,
    "accelerate": with_accelerate,
    "transformers": with_trainer,
}


def main(folder: Path) -> None:
    """Record all libraries on this rank, and Accelerate without the reduction."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for name, train in LIBRARIES.items():
        train(folder / f"{name}.json", ranks=2)
    with_accelerate(folder / "not_reduced.json", ranks=2, reduces=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
