"""Planning a large model neither allocates its tensors nor repeats work for several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import stratagem
from stratagem import SupervisedModel
from stratagem.optim import probe
from stratagem.planning import timelines
from stratagem.planning.simulate import Simulation
from stratagem.planning.tasks import DEFAULT_STRATEGIES
from tests.support.planned_models import MODELS, Language, language_batch

BATCH = (torch.zeros(2, 4), torch.zeros(2, 4))
ADAMW = {"optimizer": {"type": "AdamW"}}


@pytest.mark.slow
def test_trial_updates_of_a_plan_are_small_at_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1,024 ranks, the trial updates of an optimizer have no tensor with more than 1,000 elements."""
    sizes: list[int] = []
    before = probe._trial

    def trial(optimizer: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.extend(each.numel() for some in tensors for each in some)
        return before(optimizer, tensors, *args, **kwargs)

    monkeypatch.setattr(probe, "_trial", trial)
    network = nn.Sequential(nn.Linear(4, 3000), nn.Linear(3000, 4))
    model = SupervisedModel(network, nn.MSELoss())
    [step] = stratagem.plan(model, optim_wrapper=ADAMW, batch=BATCH, strategies=["fsdp"], worlds=[1024]).steps
    assert step.failure is None
    assert sizes
    assert max(sizes) <= 1000


@pytest.mark.slow
def test_the_default_comparison_contains_all_kinds_of_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """HSDP and tensor parallelism follow the number of ranks, and engines of one precision share their simulation."""
    dtypes: list[Any] = []
    before = timelines.record_timeline

    def record(job: Any, batch: Any, dtype: Any, **kwargs: Any) -> Any:
        dtypes.append((dtype, kwargs["tp_size"]))
        return before(job, batch, dtype, **kwargs)

    monkeypatch.setattr(timelines, "record_timeline", record)
    make_model, make_batch = MODELS["language"]
    plan = stratagem.plan(
        make_model(),
        optim_wrapper=ADAMW,
        batch=make_batch(),
        strategies=DEFAULT_STRATEGIES,
        worlds=[4],
        gpus_per_node=2,
    )
    assert [(step.refusal, step.failure) for step in plan.steps] == [(None, None)] * 16
    assert [step.options.get("replicate") for step in plan.steps if "replicate" in step.options] == [2]
    assert [step.options.get("tp") for step in plan.steps if "tp" in step.options] == [2]
    assert [step.strategy for step in plan.steps].count("DeepSpeedStrategy") == 4
    assert [step.strategy for step in plan.steps].count("ColossalAIStrategy") == 3
    assert dtypes == [(torch.bfloat16, 1), (torch.bfloat16, 2)]


@pytest.mark.slow
def test_the_default_comparison_simulates_a_deep_model_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 blocks, only one micro-batch is simulated, and one with sharded layers for ColossalAI; all else follows from up to 4.

    DDP is the exception, because the only bucket of such a small model grows with the blocks.
    """
    whole: list[tuple[str, int]] = []
    step, record = Simulation.step, timelines.record_timeline

    def noted_step(sim: Simulation, batch: Any) -> Any:
        if len(sim.model.blocks) > 4:
            whole.append((type(sim.strategy).__name__, 1))
        return step(sim, batch)

    def noted_record(job: Any, batch: Any, dtype: Any, **options: Any) -> Any:
        if len(job.make_model().blocks) > 4:
            whole.append(("micro-batch", options["tp_size"]))
        return record(job, batch, dtype, **options)

    monkeypatch.setattr(Simulation, "step", noted_step)
    monkeypatch.setattr(timelines, "record_timeline", noted_record)
    plan = stratagem.plan(
        Language(20),
        optim_wrapper=ADAMW,
        batch=language_batch(),
        strategies=DEFAULT_STRATEGIES,
        worlds=[4],
        gpus_per_node=2,
    )
    assert [(each.refusal, each.failure) for each in plan.steps] == [(None, None)] * 16
    assert [each for each in whole if each[0] != "DDPStrategy"] == [("micro-batch", 1), ("micro-batch", 2)]
