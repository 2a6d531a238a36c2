"""Plans equal real runs: static sizes, collectives and operations exactly, and the peak closely."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stratagem
from stratagem import BaseModel, SupervisedModel
from stratagem.config import Config
from stratagem.errors import ConfigTypeError, StateError
from stratagem.planning.planner import plan_config
from stratagem.planning.result import CONTEXT_BYTES, StepPlan
from tests.support.planned_models import MODELS, OPTIMIZER, measured
from tests.support.ranks import Ranks

STATIC = ("parameters", "gradients", "optimizer_state", "buffers")


def planned(kind: str, strategy: Any, world: int, **options: Any) -> StepPlan:
    make_model, make_batch = MODELS[kind]
    options = {"optim_wrapper": OPTIMIZER, "batch": make_batch(), **options}
    [step] = stratagem.plan(make_model(), strategies=[strategy], worlds=[world], **options).steps
    assert step.refusal is None
    return step


def require_equal(step: StepPlan, real: dict[str, Any]) -> None:
    assert step.failure is None
    assert {name: getattr(step.memory, name) for name in STATIC} == {name: real[name] for name in STATIC}
    found = {(each.kind, each.group_size, each.phase): (each.count, each.bytes) for each in step.collectives}
    assert found == real["collectives"]
    assert step.flops == real["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODELS))
def test_a_plan_of_one_device_equals_a_real_run(kind: str, tmp_path: Path) -> None:
    """Static sizes and operations are equal, and the peak is within 5 % of what an independent count of storages finds."""
    real = measured(kind, {"type": "SingleDeviceStrategy"}, tmp_path)
    step = planned(kind, "single", 1)
    require_equal(step, real)
    assert step.memory.peak == pytest.approx(real["peak"], rel=0.05)


@pytest.mark.slow
def test_sizes_of_a_linear_layer_are_those_computed_by_hand() -> None:
    """AdamW keeps two tensors and a 4-byte step for each parameter, and 16 weights and 4 biases are sharded over 2 ranks."""
    model = SupervisedModel(nn.Linear(4, 4), nn.MSELoss())
    batch = (torch.zeros(3, 4), torch.zeros(3, 4))
    optim = {"optimizer": {"type": "AdamW"}}
    plan = stratagem.plan(model, optim_wrapper=optim, batch=batch, strategies=["single", "fsdp"], worlds=[2])
    single, fsdp = (step.memory for step in plan.steps)
    assert (single.parameters, single.gradients, single.optimizer_state, single.batch) == (80, 80, 168, 96)
    assert (fsdp.parameters, fsdp.gradients, fsdp.optimizer_state) == (40, 40, 88)
    assert (plan.model.parameters, plan.model.batch) == (20, ("float32[3, 4]", "float32[3, 4]"))
    assert sum(single.at_peak.values()) == single.peak


@pytest.mark.slow
def test_bytes_of_a_save_and_of_resuming_are_those_computed_by_hand() -> None:
    """A checkpoint has 80 + 168 bytes. Rank 0 copies what it has of it, and reads that and half of all bytes to resume."""
    model = SupervisedModel(nn.Linear(4, 4), nn.MSELoss())
    batch = (torch.zeros(3, 4), torch.zeros(3, 4))
    plan = stratagem.plan(
        model, optim_wrapper={"optimizer": {"type": "AdamW"}}, batch=batch, strategies=["ddp", "fsdp"], worlds=[2]
    )
    assert [step.checkpoint_bytes for step in plan.steps] == [248, 248]
    assert [step.memory.host["asynchronous save"] for step in plan.steps] == [248, 40 + 88]
    assert [step.resume_bytes for step in plan.steps] == [248 + 124, 128 + 124]


@pytest.mark.slow
def test_a_configuration_without_a_strategy_is_planned_like_a_run_without_one() -> None:
    """One rank is a single device, and several are DDP."""
    model = {"type": "SupervisedModel", "network": {"type": "Linear", "in_features": 4, "out_features": 4}}
    config = Config(
        {"model": {**model, "loss": {"type": "MSELoss"}}, "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}}}
    )
    plan = plan_config(config, worlds=(1, 2), batch="float32[3,4],float32[3,4]")
    assert [(step.strategy, step.world) for step in plan.steps] == [("SingleDeviceStrategy", 1), ("DDPStrategy", 2)]


_TWO_RANKS = [
    ("language", {"type": "DDPStrategy"}),
    ("images", {"type": "DDPStrategy", "gradient_as_bucket_view": True}),
    ("language", {"type": "FSDPStrategy"}),
    ("language", {"type": "FSDPStrategy", "mixed_precision": "bfloat16", "activation_checkpointing": True}),
    ("language", {"type": "FSDPStrategy", "tp": 2}),
    ("language", {"type": "FSDPStrategy", "replicate": 2, "reshard_after_forward": False}),
    ("images", {"type": "FSDPStrategy", "wrap_policy": {"classes": ["Conv2d"]}, "cpu_offload": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), _TWO_RANKS)
def test_a_plan_of_two_ranks_equals_a_real_run(
    ranks: Ranks, tmp_path: Path, kind: str, strategy: dict[str, Any]
) -> None:
    """Static sizes of the rank with the most, collectives and operations are those of two real processes."""
    real, other = ranks.run(measured, kind, strategy, str(tmp_path))
    step = planned(kind, strategy, 2)
    if strategy.get("cpu_offload"):
        # These are in the memory of the host, where the real run on the CPU counts them as well.
        moved = {name: step.memory.host[name.replace("_", " ")] for name in STATIC[:3]}
        assert moved == {name: real[name] for name in STATIC[:3]}
        assert (step.memory.parameters, step.memory.gradients, step.memory.optimizer_state) == (0, 0, 0)
        return
    require_equal(step, {**real, **{name: max(real[name], other[name]) for name in STATIC}})


@pytest.mark.slow
def test_a_large_world_divides_the_shards() -> None:
    """At 1,024 ranks, each rank has the padded share of each parameter, and groups of 8 ranks stay inside a node."""
    step = planned("language", {"type": "fsdp", "replicate": 128}, 1024)
    assert step.memory.parameters == planned("language", "fsdp", 8).memory.parameters
    sizes = {(each.kind, each.group_size, each.ranks_per_node) for each in step.collectives if each.phase != "update"}
    assert ("all_gather", 8, 8) in sizes
    assert ("all_reduce", 128, 1) in sizes


class NeedsValues(BaseModel):
    """A model that needs values of its batch in the way that its argument names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        y = self.layer(x)
        return {"loss": getattr(self, self.kind)(x, y).sum()}

    def mask(self, x: Tensor, y: Tensor) -> Tensor:
        return y[x[:, 0] > 0]

    def nonzero(self, x: Tensor, y: Tensor) -> Tensor:
        return y[x[:, 0].nonzero()]

    def branch(self, x: Tensor, y: Tensor) -> Tensor:
        return y if (x > 0).any() else -y

    def item(self, x: Tensor, y: Tensor) -> Tensor:
        return y * x.mean().item()

    def array(self, x: Tensor, y: Tensor) -> Tensor:
        return y * float(x.numpy().sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "line", "why"),
    [
        (
            "mask",
            "return y[x[:, 0] > 0]",
            "The shape of the result of aten.nonzero.default depends on the values of tensors",
        ),
        (
            "nonzero",
            "return y[x[:, 0].nonzero()]",
            "The shape of the result of aten.nonzero.default depends on the values",
        ),
        ("branch", "return y if (x > 0).any() else -y", "This line reads a value of a tensor"),
        ("item", "return y * x.mean().item()", "This line reads a value of a tensor"),
        (
            "array",
            "return y * float(x.numpy().sum())",
            "it needs values, which tensors do not have in a simulated step",
        ),
    ],
)
def test_a_model_that_needs_values_keeps_its_static_sizes(kind: str, line: str, why: str) -> None:
    """The plan names the file, the line and the reason, and static sizes are still exact."""
    plan = stratagem.plan(
        NeedsValues(kind), optim_wrapper=OPTIMIZER, batch=torch.zeros(2, 4), strategies=["single", "fsdp"], worlds=[2]
    )
    for step, (parameters, state) in zip(plan.steps, ((80, 168), (40, 88)), strict=True):
        assert step.failure is not None
        assert f"{Path(__file__).name}:" in step.failure
        assert f"in {kind}: {line}" in step.failure
        assert why in step.failure
        assert (step.memory.parameters, step.memory.gradients, step.memory.optimizer_state) == (
            parameters, parameters, state,
        )  # fmt: skip
        assert (step.memory.peak, step.memory.activations, step.flops) == (None, None, None)


@pytest.mark.slow
def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    """With the returned micro-batch, the peak is at most the memory; with one more sample, it is larger."""
    limit = CONTEXT_BYTES + 1_000_000
    largest = planned("language", "single", 1, memory=limit).largest_micro_batch
    assert largest is not None

    def total(size: int) -> int:
        batch = {"tokens": torch.zeros(size, 16, dtype=torch.int64)}
        return planned("language", "single", 1, batch=batch).memory.total

    assert total(largest) <= limit < total(largest + 1)


@pytest.mark.slow
def test_accumulated_micro_batches_count_as_often_as_they_run() -> None:
    """With 8 micro-batches, DDP reduces gradients once, and the operations are 8 times those of one micro-batch."""
    one = planned("language", "ddp", 2)
    eight = planned("language", "ddp", 2, optim_wrapper={**OPTIMIZER, "accumulative_counts": 8})
    assert eight.flops == 8 * (one.flops or 0)
    reduced = [sum(each.count for each in step.collectives if each.phase == "backward") for step in (one, eight)]
    assert reduced[0] == reduced[1]


@pytest.mark.slow
def test_planning_leaves_the_model_and_the_random_generators_unchanged() -> None:
    """Parameters keep their memory and values, and the same random numbers follow."""
    make_model, make_batch = MODELS["images"]
    model = make_model()
    before = {name: (each.data_ptr(), each.clone()) for name, each in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    stratagem.plan(model, optim_wrapper=OPTIMIZER, batch=make_batch(), strategies=["ddp", "fsdp"], worlds=[2])
    assert torch.equal(torch.rand(3), expected)
    for name, each in model.state_dict().items():
        assert each.data_ptr() == before[name][0]
        assert torch.equal(each, before[name][1])


def test_averaged_weights_of_the_configuration_count() -> None:
    """EMAHook keeps one more copy of the float32 weights."""
    model = {"type": "SupervisedModel", "network": {"type": "Linear", "in_features": 4, "out_features": 4}}
    config = Config(
        {
            "model": {**model, "loss": {"type": "MSELoss"}},
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
            "custom_hooks": [{"type": "EMAHook"}],
        }
    )
    [step] = plan_config(config, strategies=["single"], batch="float32[2,4],float32[2,4]").steps
    assert (step.memory.ema, step.memory.at_peak["averaged weights"]) == (80, 80)
    assert step.memory.optimizer_state == 0


@pytest.mark.slow
def test_a_dataset_that_uses_the_network_is_refused() -> None:
    """Nothing is downloaded: the error suggests to describe the batch instead."""

    class Remote(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> int:
            with socket.socket() as connection:
                connection.connect(("127.0.0.1", 9))
            return index

    config = Config({"model": {"type": "Linear"}, "optim_wrapper": {}, "train_dataloader": {"dataset": Remote()}})
    with pytest.raises(StateError, match="planning downloads nothing. Describe the batch instead: --batch"):
        plan_config(config)


def test_a_module_without_a_training_step_is_refused() -> None:
    """The error names the wrappers that add a training step."""
    with pytest.raises(ConfigTypeError, match=r"Linear has no train_step. Wrap it, .* SupervisedModel"):
        stratagem.plan(nn.Linear(1, 1), optim_wrapper=OPTIMIZER)


@pytest.mark.slow
def test_a_strategy_that_does_not_divide_the_ranks_is_refused_in_its_plan() -> None:
    """The plan has the error of the strategy, and other strategies are still planned."""
    make_model, make_batch = MODELS["language"]
    strategies = [{"type": "fsdp", "replicate": 3}, "fsdp"]
    plan = stratagem.plan(make_model(), optim_wrapper=OPTIMIZER, batch=make_batch(), strategies=strategies, worlds=[4])
    assert "does not divide the 4 processes" in (plan.steps[0].refusal or "")
    assert plan.steps[1].refusal is None


@pytest.mark.slow
def test_a_plan_with_offloading_mentions_what_its_time_lacks() -> None:
    """The rates of the CPU and of its link to the device are unknown, so the time is too short."""
    notes = [" ".join(planned("language", {"type": "fsdp", "cpu_offload": each}, 2).notes) for each in (True, False)]
    assert ["does not include the update on the CPU" in each for each in notes] == [True, False]


@pytest.mark.slow
def test_muon_under_fsdp_is_planned() -> None:
    """The update, which sends parts of matrices, is simulated, and each rank has a quarter of the momenta."""
    model = SupervisedModel(nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False)), nn.MSELoss())
    optim = {"optimizer": {"type": "Muon", "lr": 0.1}}
    batch = torch.zeros(4, 16), torch.zeros(4, 8)
    [step] = stratagem.plan(model, optim_wrapper=optim, batch=batch, strategies=["fsdp"], worlds=[4]).steps
    assert step.failure is None
    assert step.memory.optimizer_state == (16 * 32 + 32 * 8) * 4 // 4
