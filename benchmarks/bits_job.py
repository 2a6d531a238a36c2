"""Train jobs of ``bits_cases.py`` and record every value. ``bits.py`` starts this script once for each revision.

It runs against several revisions of Stratagem, so it uses only names that do not change: those of the public interface and
of configurations. Gradients, parameters and moments are recorded by torch's global optimizer hooks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from bits_cases import CASES, SAMPLES, Case
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import Dataset

import stratagem
from stratagem import BaseModel, Runner
from stratagem.dist import init_dist
from stratagem.train import Hook

FEATURES, CLASSES, WIDTH = 6, 4, 8
_WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module)\.")

Value = Tensor | str
# The run ("whole" or "resumed"), the iteration, the category, the name and the value.
Entry = tuple[str, int, str, str, Value]


@final
class Samples(Dataset[dict[str, Any]]):
    """Samples that are augmented with numbers from the generators of torch, NumPy and Python."""

    def __init__(self, length: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(7)
        self._inputs = torch.randn(length, FEATURES, generator=generator)
        self._classes = torch.randint(CLASSES, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.randn(FEATURES) * float(np.random.uniform(0.05, 0.1))
        inputs = self._inputs[index] * random.uniform(0.9, 1.1) + noise
        return {"inputs": inputs, "classes": self._classes[index], "numbers": index}


@final
class Block(nn.Module):
    """Two layers, added to their input."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 2 * WIDTH)
        self.reduce = nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the output of the layers."""
        added: Tensor = self.drop(self.reduce(functional.gelu(self.expand(self.norm(x)))))
        return x + added


@final
class Network(BaseModel):
    """Blocks with LayerNorm, optionally BatchNorm, dropout, and losses weighted by their number of samples."""

    tp_plan: ClassVar = {"blocks.*.expand": "colwise", "blocks.*.reduce": "rowwise"}

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.0, weighted: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.batch_norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)
        self._weighted = weighted

    def forward(self, *args: Any, mode: str = "tensor", **batch: Any) -> Any:
        """Return the scores or, with ``mode``, the losses or the predictions."""
        classes, numbers = batch["classes"], batch["numbers"]
        x = self.batch_norm(self.first(batch["inputs"]))
        for block in self.blocks:
            x = block(x)
        scores = self.head(x)
        if mode == "loss":
            losses = {"loss": functional.cross_entropy(scores, classes), "norm": scores.detach().norm()}
            return {**losses, "weight": float(1 + numbers.sum())} if self._weighted else losses
        return {"preds": scores, "target": classes} if mode == "predict" else scores


@final
class TwoNetworks(BaseModel):
    """A generator and a critic, each with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, FEATURES))
        self.critic = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, 1))

    def forward(self, *args: Any, mode: str = "tensor", **batch: Any) -> Any:
        """Return the critic's output or, with ``mode="predict"``, predictions that are computed from it."""
        scores = self.critic(batch["inputs"])
        preds = torch.cat([scores, -scores, scores * 2, scores * 3], dim=1)
        return {"preds": preds, "target": batch["classes"]} if mode == "predict" else scores

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Update the generator, then the critic."""
        inputs = self.data_preprocessor(data, True)["inputs"]
        generator, critic = optim_wrapper["generator"], optim_wrapper["critic"]
        with generator.optim_context(self.generator):
            made = self.generator(torch.randn(len(inputs), 2))
            generator_loss = -self.critic(made).mean()
        generator.update_params(generator_loss)
        critic.zero_grad()
        with critic.optim_context(self.critic):
            scores = self.critic(torch.cat([inputs, made.detach()]))
            critic_loss = functional.softplus(scores * torch.linspace(-1, 1, len(scores))[:, None]).mean()
        critic.update_params(critic_loss)
        return {"generator_loss": generator_loss.detach(), "critic_loss": critic_loss.detach()}


@final
class Recorder(Hook):
    """Records the values of a run. Optimizer hooks call :meth:`before_step` and :meth:`after_step`.

    Args:
        run_name: ``"whole"`` or ``"resumed"``.
    """

    priority = "LOW"

    def __init__(self, run_name: str) -> None:
        self.entries: list[Entry] = []
        self._run_name = run_name
        self._iteration = 0
        self._names: dict[int, str] = {}
        self._optimizers: list[int] = []

    def add(self, category: str, name: str, value: Any) -> None:
        """Record a value: the local part of a tensor, a number as a tensor, everything else as text."""
        self.entries.append((self._run_name, self._iteration, category, name, _plain(value)))

    def before_run(self, run: Any) -> None:
        self._names = {id(parameter): _bare(name) for name, parameter in run.model.named_parameters()}

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._iteration = run.iter + 1
        for name, value in sorted(data_batch.items()):
            self.add("samples", name, value)
        for name, groups in _groups(run.optim_wrapper):
            for index, group in enumerate(groups):
                for key in ("lr", "momentum", "betas", "weight_decay"):
                    if key in group:
                        self.add("options", f"{name}group {index} {key}", group[key])

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for name, value in sorted(outputs.items()):
            self.add("losses", name, value)
        for name, parameter in run.model.named_parameters():
            self.add("parameters", f"model {_bare(name)}", parameter)
        for name, buffer in run.model.named_buffers():
            self.add("buffers", _bare(name), buffer)
        self.add("generators", "torch", torch.get_rng_state())
        self.add("generators", "numpy", _digest(np.random.get_state()))
        self.add("generators", "python", _digest(random.getstate()))

    def after_val_epoch(self, run: Any, metrics: dict[str, Any] | None = None) -> None:
        for name, value in sorted((metrics or {}).items()):
            self.add("metrics", name, value)

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Record the gradients that the optimizer receives."""
        for name, parameter in self._parameters(optimizer):
            if parameter.grad is not None:
                self.add("gradients", name, parameter.grad)

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Record the parameters and the state after the update."""
        for name, parameter in self._parameters(optimizer):
            self.add("parameters", f"step {name}", parameter)
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                self.add("moments", f"{name} {key}", value)

    def _parameters(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's parameters by name. Flat parameters of an engine have no name and get their index.

        Trial updates of other optimizers before the first iteration are not recorded.
        """
        if self._iteration == 0:
            return
        if id(optimizer) not in self._optimizers:
            self._optimizers.append(id(optimizer))
        number = self._optimizers.index(id(optimizer))
        for index, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                own = self._names.get(id(parameter), f"group {index} parameter {position}")
                yield f"optimizer {number} {own}", parameter


def _groups(optim_wrapper: Any) -> list[tuple[str, Any]]:
    groups = optim_wrapper.param_groups
    return [(f"{name} ", own) for name, own in groups.items()] if isinstance(groups, Mapping) else [("", groups)]


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _plain(value: Any) -> Value:
    if isinstance(value, Tensor):
        local = value.detach()
        if hasattr(local, "to_local"):
            local = local.to_local()
        return local.cpu().clone().contiguous()
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return repr(value)


def train(case: Case, folder: Path, recorder: Recorder, resume: Path | None) -> None:
    """Train a job from the beginning, or from a checkpoint to the end."""
    loader = {"dataset": Samples(), "batch_size": case.batch_size, "num_workers": case.workers}
    metric = {"type": "Accuracy", "task": "multiclass", "num_classes": CLASSES}
    average = [{"type": "EMAHook", "momentum": 0.1}] if case.average else []
    runner = Runner(
        {"type": TwoNetworks} if case.two_networks else {"type": Network, **case.model},
        work_dir=str(folder),
        train_dataloader=loader,
        optim_wrapper=dict(case.optim_wrapper),
        param_scheduler=[dict(each) for each in case.param_scheduler],
        train_cfg=dict(case.train_cfg),
        val_dataloader={"dataset": Samples(8), "batch_size": 4},
        val_cfg={},
        val_evaluator=metric,
        strategy=dict(case.strategy),
        default_hooks={"logger": None, "checkpoint": {"by_epoch": False, "interval": case.resume_at}},
        custom_hooks=[*average, recorder],
        randomness={"seed": 3},
        log_level="ERROR",
        resume=False if resume is None else str(resume),
    )
    hooks = (
        register_optimizer_step_pre_hook(recorder.before_step),
        register_optimizer_step_post_hook(recorder.after_step),
    )
    try:
        runner.train()
    finally:
        for hook in hooks:
            hook.remove()
        runner.close()


def record(case: Case, folder: Path) -> list[Entry]:
    """Train a job, then resume its checkpoint in a second run; return the entries of both."""
    whole, resumed = Recorder("whole"), Recorder("resumed")
    train(case, folder / "whole", whole, None)
    train(case, folder / "resumed", resumed, folder / "whole" / f"iter_{case.resume_at}")
    return whole.entries + resumed.entries


def main() -> int:
    """Train the given jobs one after another on this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where records and checkpoints are written")
    parser.add_argument("--source", type=Path, required=True, help="the folder from which Stratagem must be imported")
    parser.add_argument("cases", nargs="+", choices=CASES)
    options = parser.parse_args()
    imported = Path(str(stratagem.__file__)).resolve().parents[1]
    if imported != options.source.resolve():
        print(f"Stratagem was imported from {imported} instead of {options.source}.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        init_dist("pytorch")
    for name in options.cases:
        folder = options.folder / name
        begin = time.perf_counter()
        try:
            entries = record(CASES[name], folder)
        except BaseException:  # noqa: BLE001 -- the launcher reports it
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"error_{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
            return 1
        torch.save(entries, folder / f"rank_{rank}.pt")
        if rank == 0:
            seconds = {"seconds": time.perf_counter() - begin}
            (folder / "finished.json").write_text(json.dumps(seconds), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
