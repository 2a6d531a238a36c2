"""Details of the plans of engines, which need not be installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stratagem
from stratagem import SupervisedModel
from stratagem.planning import timelines
from stratagem.planning.batch import BatchSpec
from stratagem.planning.model_copies import meta_copy
from stratagem.planning.result import StepPlan
from stratagem.planning.simulate import Job
from stratagem.planning.timeline import interpolated, record_timeline
from tests.support.planned_models import MODELS

ADAMW = {"optimizer": {"type": "AdamW"}}


def planned(strategy: dict[str, Any]) -> StepPlan:
    """Return the plan of a CNN whose batch normalization has two buffers with 8 float32 values, and a counter in int64."""
    make_model, make_batch = MODELS["images"]
    [step] = stratagem.plan(
        make_model(), optim_wrapper=ADAMW, batch=make_batch(), strategies=[strategy], worlds=[2]
    ).steps
    assert (step.refusal, step.failure) == (None, None)
    return step


class Reading(nn.Module):
    """Reads the weight of an embedding without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(3, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.position.weight)


def test_a_module_that_reads_a_parameter_of_another_one_needs_it() -> None:
    """ZeRO stage 3 gathers the weight of the embedding for the module that reads it."""
    model = meta_copy(SupervisedModel(Reading(), nn.MSELoss()))
    batch = (torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta"))
    timeline = record_timeline(Job(make_model=lambda: meta_copy(model), optim_wrapper=ADAMW), batch, None)
    names = [name for name, _ in model.named_modules()]
    needed = {name: timeline.modules[number] for number, name in enumerate(names)}
    assert (needed[""], needed["network"], needed["network.position"]) == ((), (0,), (0,))
    assert needed["network.linear"] == (1, 2)


@pytest.mark.slow
def test_deepspeed_keeps_buffers_in_float32() -> None:
    """In bfloat16, the buffers of DeepSpeed still have 2 x 8 x 4 + 8 bytes, and those of ColossalAI 2 x 8 x 2 + 8."""
    deepspeed = planned({"type": "deepspeed", "zero_optimization": {"stage": 1}, "bf16": True})
    colossalai = planned({"type": "colossalai", "plugin": {"type": "lowlevel-zero"}, "mixed_precision": "bf16"})
    assert (deepspeed.memory.buffers, colossalai.memory.buffers) == (72, 40)


def test_colossalai_broadcasts_buffers_before_a_step() -> None:
    """DistributedDataParallel sends one message for each dtype."""
    step = planned({"type": "colossalai", "plugin": "torch-ddp"})
    [broadcast] = [each for each in step.collectives if each.kind == "broadcast"]
    assert (broadcast.count, broadcast.bytes, broadcast.phase) == (2, 72, "forward")


@pytest.mark.slow
def test_labels_are_short() -> None:
    """Labels contain names and dtypes without keys, and the options of a section without the section."""
    deepspeed = planned({"type": "deepspeed", "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    plugin = {"type": "lowlevel-zero", "stage": 2}
    colossalai = planned({"type": "colossalai", "plugin": plugin, "mixed_precision": "bf16"})
    assert deepspeed.label == "DeepSpeed stage=2 bf16"
    assert colossalai.label == "ColossalAI lowlevel-zero stage=2 bf16"


class TestMicroBatchesOfOtherSizes:
    """The micro-batches of other sizes follow from two that were simulated."""

    @pytest.mark.slow
    def test_they_equal_simulated_ones(self) -> None:
        """A micro-batch of 11 samples on the lines through those of 2 and 4 samples is the simulated one."""
        make_model, make_batch = MODELS["language"]
        job = Job(make_model=lambda: meta_copy(make_model()), optim_wrapper=ADAMW)
        batch = BatchSpec.of(make_batch())
        two, four, eleven = (record_timeline(job, batch.resized(size), None) for size in (2, 4, 11))
        assert interpolated(two, four, (11 - 2) / 2) == eleven

    @pytest.mark.slow
    def test_each_engine_does_not_simulate_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With three engines, the model is simulated with its batch, with two other sizes, and with one that checks them."""
        sizes: list[int] = []
        before = timelines.record_timeline

        def record(job: Any, batch: Any, dtype: Any, **kwargs: Any) -> Any:
            sizes.append(len(batch[0]))
            return before(job, batch, dtype, **kwargs)

        monkeypatch.setattr(timelines, "record_timeline", record)
        make_model, make_batch = MODELS["images"]
        plan = stratagem.plan(
            make_model(),
            optim_wrapper=ADAMW,
            batch=tuple(each[:1] for each in make_batch()),
            strategies=[{"type": "deepspeed", "zero_optimization": {"stage": stage}} for stage in (0, 1, 2)],
            worlds=[2],
            memory=8 * 2**30,
        )
        assert sizes[:3] == [1, 2, 4]
        assert len(sizes) == 4
        assert sizes[3] == plan.steps[0].largest_micro_batch
        assert len({step.largest_micro_batch for step in plan.steps}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bucket", "flat_copy"), [("bf16", 20_000, 2 * 8320), (None, 40_000, 0)])
def test_the_update_of_stage_3_copies_gradients_in_half_precision(
    dtype: str | None, bucket: int, flat_copy: int
) -> None:
    """The update of 2 x (64 x 64 + 64) elements needs the bucket of 10,000 and, in bfloat16, a flat copy of the gradients."""
    strategy: dict[str, Any] = {"type": "deepspeed", "zero_optimization": {"stage": 3, "reduce_bucket_size": 10_000}}
    if dtype is not None:
        strategy[dtype] = True
    model = SupervisedModel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), nn.MSELoss())
    batch = (torch.zeros(1, 64), torch.zeros(1, 64))
    [step] = stratagem.plan(model, optim_wrapper=ADAMW, batch=batch, strategies=[strategy], worlds=[1]).steps
    assert step.memory.peak_phase == "update"
    assert step.memory.peak == step.memory.static + step.memory.batch + bucket + flat_copy
