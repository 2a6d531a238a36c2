"""The axes of ``matrix.py``: placements, optimizers and cases, the combinations that are refused, and the choice of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, NamedTuple, final

import torch
from environments import python_of
from torch import nn
from torch.optim import Optimizer

from stratagem.registry import MODELS, OPTIMIZERS
from stratagem.train import Hook

__all__ = [
    "CASES", "FEW", "OPTIMIZERS_COMPARED", "PLACEMENTS", "Job", "OptimizerChoice", "Placement", "Plan", "Resume",
    "Unfreezing", "case_model", "choose", "pairs_in", "reference", "refusal", "register_models",
]  # fmt: skip


# ---- placements ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A row and a column of the table.

    Attributes:
        processes: the number of processes.
        strategy: the ``strategy`` of the configuration.
        shared: the number of processes that train on the same samples.
        averages: whether averaged weights are kept; some strategies do not support them.
    """

    processes: int
    strategy: Mapping[str, Any]
    shared: int = 1
    averages: bool = True

    @property
    def parts(self) -> int:
        """The number of parts that each global batch is split into."""
        return self.processes // self.shared

    @property
    def python(self) -> str | None:
        """The Python interpreter for this placement; None if its engine is not installed."""
        return python_of(self.strategy["type"])


def _deepspeed(stage: int) -> dict[str, Any]:
    return {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}}


def _colossalai(plugin: str, **options: Any) -> dict[str, Any]:
    return {"type": "ColossalAIStrategy", "plugin": {"type": plugin, **options}}


# ZeRO without a prefix is DeepSpeed; CAI is ColossalAI.
PLACEMENTS: Final[Mapping[str, Placement]] = {
    "single": Placement(processes=1, strategy={"type": "SingleDeviceStrategy"}),
    "DDP x2": Placement(processes=2, strategy={"type": "DDPStrategy"}),
    "FSDP x2": Placement(processes=2, strategy={"type": "FSDPStrategy"}),
    "FSDP x4": Placement(processes=4, strategy={"type": "FSDPStrategy"}),
    "HSDP 2x2": Placement(processes=4, strategy={"type": "FSDPStrategy", "replicate": 2}),
    "TP x2": Placement(processes=2, strategy={"type": "FSDPStrategy", "tp": 2}, shared=2),
    "FSDP x TP 2x2": Placement(processes=4, strategy={"type": "FSDPStrategy", "tp": 2}, shared=2),
    "ZeRO 1 x2": Placement(processes=2, strategy=_deepspeed(1)),
    "ZeRO 2 x2": Placement(processes=2, strategy=_deepspeed(2)),
    "ZeRO 3 x2": Placement(processes=2, strategy=_deepspeed(3), averages=False),
    "ZeRO 3 x4": Placement(processes=4, strategy=_deepspeed(3), averages=False),
    "CAI DDP x2": Placement(processes=2, strategy=_colossalai("torch-ddp")),
    "CAI ZeRO 1 x2": Placement(processes=2, strategy=_colossalai("lowlevel-zero", stage=1)),
    "CAI ZeRO 2 x4": Placement(processes=4, strategy=_colossalai("lowlevel-zero", stage=2)),
    "CAI TP x2": Placement(processes=2, strategy=_colossalai("hybrid-parallel", tp_size=2), shared=2, averages=False),
}


# ---- optimizers ---------------------------------------------------------------------------------------------------


@OPTIMIZERS.register_module(name="MatrixScheduleFreeSGD")
class ScheduleFreeSGD(Optimizer):
    """SGD of arXiv:2405.15682: parameters are ``y`` in training and ``x``, the mean of all ``z``, in evaluation.

    The environments of the engines do not contain a package with schedule-free optimizers.
    """

    BETA: Final = 0.9

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "k": 0, "train_mode": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                if y.grad is None:
                    continue
                z = self.state[y].setdefault("z", y.detach().clone())
                x = y.lerp(z, 1 - 1 / self.BETA)
                z.sub_(y.grad.add(y, alpha=group["weight_decay"]), alpha=group["lr"])
                y.copy_(x.lerp_(z, 1 / group["k"]).mul_(self.BETA).add_(z, alpha=1 - self.BETA))

    def train(self) -> None:
        """Switch the parameters to ``y``."""
        self._switch(1 - self.BETA, train_mode=True)

    def eval(self) -> None:
        """Switch the parameters to ``x``."""
        self._switch(1 - 1 / self.BETA, train_mode=False)

    @torch.no_grad()
    def _switch(self, weight: float, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                group["train_mode"] = train_mode
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerChoice:
    """An optimizer of the matrix.

    Attributes:
        letter: its abbreviation in the table.
        config: the ``optimizer`` of the configuration.
        parameter_groups: whether the parameters are in groups with different weight decay.
        averages: whether averaged weights are kept.
        states_within: the limit of the differences of parameters, moments and averages, relative to the
            largest value of their tensor.
        few_within: the limit of the largest differences in each tensor, those of one in ``FEW`` elements.
        losses_within: the limit of the differences of losses.
    """

    letter: str
    config: Mapping[str, Any]
    parameter_groups: bool = True
    averages: bool = True
    states_within: float
    few_within: float = 0.0
    losses_within: float = 1e-5


# See OptimizerChoice.few_within.
FEW: Final = 500
OPTIMIZERS_COMPARED: Final[Mapping[str, OptimizerChoice]] = {
    # AdamW normalizes each gradient by its magnitude. A gradient that is 100 times smaller than the largest one of its tensor
    # therefore has 100 times its relative rounding error of 1e-7, accumulated over 6 updates, and a few gradients are even
    # smaller: 4 of 4096 elements differ by 1.6e-4 between FSDP and HSDP on 4 ranks, and by 1e-14 if both train in float64.
    "AdamW": OptimizerChoice(
        letter="A",
        config={"type": "AdamW", "lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1},
        states_within=1e-4,
        few_within=1e-3,
    ),
    "SGD": OptimizerChoice(
        letter="S", config={"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, states_within=1e-4
    ),
    # Muon orthogonalizes in bfloat16, and amplifies directions in which a gradient is almost 0 to the size of the others. With
    # few samples, gradients have such directions, and rounding errors change their updates.
    "Muon + AdamW": OptimizerChoice(
        letter="M",
        config={
            "type": "MixedOptimizer",
            "parts": {
                "muon": {"type": "Muon", "lr": 0.01, "weight_decay": 0.1},
                "adamw": {"type": "AdamW", "lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.0},
            },
            "hidden_matrices": "muon",
            "others": "adamw",
        },
        parameter_groups=False,
        states_within=1e-1,
        losses_within=1e-4,
    ),
    "Adafactor": OptimizerChoice(
        letter="F", config={"type": "Adafactor", "lr": 0.01, "weight_decay": 0.1}, states_within=1e-4
    ),
    "schedule-free": OptimizerChoice(
        letter="X",
        config={"type": "MatrixScheduleFreeSGD", "lr": 0.1, "weight_decay": 0.01},
        averages=False,
        states_within=1e-4,
    ),
}


# ---- cases --------------------------------------------------------------------------------------------------------

# The letter of each case in the table.
CASES: Final[Mapping[str, str]] = {"token weights": "t", "BatchNorm": "b", "unfreezing": "u"}
# In the case of unfreezing: the parameters that are frozen at first, and the iteration before which they become trainable. One
# is before the checkpoint, the other after it.
FROZEN_UNTIL: Final = {"position_embedding.weight": 4, "norm.weight": 8}


def case_model(case: str) -> str:
    """Return the name of the model of a case."""
    return {"BatchNorm": "MatrixGptWithBatchNorm", "unfreezing": "MatrixGptPartlyFrozen"}.get(case, "Gpt")


def register_models() -> None:
    """Register the models of the cases. The example must be imported before."""
    gpt: Any = MODELS.get("Gpt")

    @MODELS.register_module(name="MatrixGptWithBatchNorm", force=True)
    class WithBatchNorm(gpt):
        """The language model with a batch normalization of the features."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.norm = nn.Sequential(_FeatureNorm(options["width"]), self.get_submodule("norm"))
            # The normalization removes what the bias in front of it adds, so the gradient of this bias consists of rounding
            # errors, and AdamW would move it, and the running mean with it, in another direction under each placement.
            self.get_parameter(f"blocks.{options['blocks'] - 1}.mlp_out.bias").requires_grad_(False)

    @MODELS.register_module(name="MatrixGptPartlyFrozen", force=True)
    class PartlyFrozen(gpt):
        """The language model with frozen parameters."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name not in FROZEN_UNTIL)


class _FeatureNorm(nn.BatchNorm1d):
    """Batch normalization of the last dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@final
class Unfreezing(Hook):
    """Makes the frozen parameters trainable."""

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        for name, parameter in run.strategy.unwrap_model().named_parameters():
            if FROZEN_UNTIL.get(name) == run.iter:
                parameter.requires_grad_(True)


# ---- refusals -----------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """Combinations that are refused.

    Attributes:
        placements: the beginnings of the names of the placements.
        value: the optimizer or the case.
        reason: the reason in short.
    """

    placements: tuple[str, ...]
    value: str
    reason: str


_ENGINES: Final = ("ZeRO", "CAI")
_REFUSED: Final = (
    _Refusal(placements=_ENGINES, value="Muon + AdamW", reason="engines support only one optimizer"),
    _Refusal(
        placements=("ZeRO", "CAI ZeRO"),
        value="schedule-free",
        reason="the parameters are copies of those that the optimizer updates",
    ),
    _Refusal(
        placements=("ZeRO", "CAI ZeRO", "CAI TP"),
        value="Adafactor",
        reason="each rank updates a part of each parameter",
    ),
    _Refusal(
        placements=("CAI DDP", "CAI TP"),
        value="BatchNorm",
        reason="ColossalAI converts it to SyncBatchNorm, which requires a GPU",
    ),
    _Refusal(placements=_ENGINES, value="unfreezing", reason="engines determine the trainable parameters at the start"),
)


def refusal(placement: str, optimizer: str, case: str) -> str:
    """Return a short reason why a combination is refused; empty if it is supported."""
    found = (each for each in _REFUSED if placement.startswith(each.placements) and each.value in (optimizer, case))
    return next((each.reason for each in found), "")


# ---- choice -------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A training: a placement with an optimizer in a case."""

    placement: str
    optimizer: str
    case: str


class Resume(NamedTuple):
    """A job that resumes from the checkpoint of another placement."""

    saver: str
    job: Job


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The runs of a matrix.

    Attributes:
        whole: the uninterrupted runs, which save the checkpoints and are the references.
        resumes: the runs that resume.
        refused: the combinations that must be refused; each is tried.
    """

    whole: Sequence[Job]
    resumes: Sequence[Resume]
    refused: Sequence[Job]


def reference(names: Sequence[str], job: Job, saver: str) -> Job | None:
    """Return the uninterrupted run that a resumed run must equal; None if there is none.

    Batch normalization depends on how a batch is split, so both placements must split it into the same number of parts.
    """
    parts = PLACEMENTS[job.placement].parts
    if job.case != "BatchNorm":
        return Job("single", job.optimizer, job.case)
    if PLACEMENTS[saver].parts != parts:
        return None
    name = next(
        name for name in names if PLACEMENTS[name].parts == parts and not refusal(name, job.optimizer, job.case)
    )
    return Job(name, job.optimizer, job.case)


def choose(names: Sequence[str], *, full: bool) -> Plan:
    """Return all runs, or runs in which all pairs of values of saver, resumer, optimizer and case occur."""
    combinations = list(product(OPTIMIZERS_COMPARED, CASES))
    saved = {name: _saved(number, name, combinations, full=full) for number, name in enumerate(names)}
    resumes = [
        Resume(saver, Job(name, *combination))
        for saver, name in product(names, names)
        for combination in saved[saver]
        if not refusal(name, *combination)
    ]
    if not full:
        resumes = list(_covering(names, resumes))
    saving = [Job(name, *combination) for name in names for combination in saved[name]]
    references = [reference(names, each.job, each.saver) for each in resumes]
    references += [Job("single", each.job.optimizer, each.job.case) for each in resumes]
    references += [reference(names, job, job.placement) for job in saving]
    refused = [Job(name, optimizer, "token weights") for name, optimizer in product(names, OPTIMIZERS_COMPARED)]
    refused += [Job(name, "AdamW", case) for name, case in product(names, CASES)]
    return Plan(
        whole=sorted({*saving, *(job for job in references if job is not None)}),
        resumes=resumes,
        refused=sorted({job for job in refused if refusal(*job)}),
    )


def _saved(number: int, name: str, combinations: Sequence[tuple[str, str]], *, full: bool) -> list[tuple[str, str]]:
    """Return the optimizers and cases of the checkpoints that a placement saves."""
    supported = [each for each in combinations if not refusal(name, *each)]
    if full or len({optimizer for optimizer, _ in supported}) < len(CASES):
        return supported
    # One case for each optimizer, and a combination that all placements support.
    cases = list(CASES)
    chosen = {("AdamW", "token weights")}
    for position, optimizer in enumerate(OPTIMIZERS_COMPARED):
        ordered = (cases[(number + position + shift) % len(cases)] for shift in range(len(cases)))
        chosen |= {
            (optimizer, case) for case in [next((c for c in ordered if (optimizer, c) in supported), "")] if case
        }
    return sorted(chosen)


def _covering(names: Sequence[str], possible: Sequence[Resume]) -> Iterator[Resume]:
    """Yield resumes that cover all pairs of two values that occur in the possible ones."""
    covered: set[tuple[Any, ...]] = set()
    for saver, name in product(names, names):
        candidates = [each for each in possible if (each.saver, each.job.placement) == (saver, name)]
        if candidates:
            best = max(candidates, key=lambda each: len(pairs_in(each) - covered))
            covered |= pairs_in(best)
            yield best
    while left := [each for each in possible if pairs_in(each) - covered]:
        best = max(left, key=lambda each: len(pairs_in(each) - covered))
        covered |= pairs_in(best)
        yield best


def pairs_in(resume: Resume) -> set[tuple[Any, ...]]:
    """Return all pairs of two values of saver, resumer, optimizer and case in a run."""
    values = [
        ("saver", resume.saver),
        ("resumer", resume.job.placement),
        ("optimizer", resume.job.optimizer),
        ("case", resume.job.case),
    ]
    return {(one, other) for number, one in enumerate(values) for other in values[number + 1 :]}
