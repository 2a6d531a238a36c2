"""ColossalAI's plugins give the same training results as a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.colossalai import boosted_cases, boosted_runs
from tests.support import backward_passes, batch_norm_runs
from tests.support.backward_passes import OPTIMIZERS, by_plain_torch, require_equal
from tests.support.ranks import Ranks
from tests.support.sharded_runs import OPTIM

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]

EXACT = ["torch-ddp", "zero 1", "zero 2", "hybrid", "hybrid tp 2", "hybrid tp 2 by plan"]
# bfloat16 has 8 mantissa bits and float16 has 11; the losses here are about 3 and the norms about 0.7.
ROUGH = {
    "zero 1 bf16": 0.03,
    "zero 2 bf16": 0.03,
    "hybrid bf16": 0.03,
    "hybrid zero 1 bf16": 0.03,
    "zero 1 fp16": 0.005,
}


@pytest.mark.parametrize("plugin", EXACT)
def test_plugins_in_float32_match_a_single_process(
    two: Ranks, single: dict[str, Any], tmp_path: Path, plugin: str
) -> None:
    """Losses, norms before clipping, rates, weights, and optimizer states agree up to float32 rounding."""
    for seen in two.run(boosted_runs.trained, plugin, str(tmp_path)):
        _require_equal(seen, single)


@pytest.mark.parametrize("plugin", ["zero 1", "zero 2", "hybrid tp 2"])
def test_four_ranks_match_a_single_process(four: Ranks, single: dict[str, Any], tmp_path: Path, plugin: str) -> None:
    """Four ranks agree too, also with layers sharded over two ranks and replicated over two."""
    for seen in four.run(boosted_runs.trained, plugin, str(tmp_path)):
        _require_equal(seen, single)


@pytest.mark.parametrize("plugin", ROUGH)
def test_low_precision_is_close_to_float32(two: Ranks, single: dict[str, Any], tmp_path: Path, plugin: str) -> None:
    """Losses in bfloat16 and float16 agree within their precision, and every step is taken."""
    for seen in two.run(boosted_runs.trained, plugin, str(tmp_path)):
        assert seen["losses"] == pytest.approx(single["losses"], abs=ROUGH[plugin])
        assert seen["norms"] == pytest.approx(single["norms"], abs=ROUGH[plugin])
        assert (seen["updates"], seen["attempts"]) == (6, 6)


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 1", "zero 2"])
def test_a_shorter_last_window_is_averaged_over_its_length(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """With seven micro-batches in windows of four, the last step is the mean of three, as in one process."""
    options = {"optim": {**OPTIM, "accumulative_counts": 4}, "stop": 7, "iterations": 7}
    alone = boosted_cases.trained_alone(str(tmp_path / "single"), **options)
    for seen in two.run(boosted_runs.trained, plugin, str(tmp_path / "two"), **options):
        _require_equal(seen, alone)
        assert seen["updates"] == 2


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 1", "zero 2", "hybrid tp 2"])
def test_micro_batches_are_averaged_by_weight(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """The step is the weighted mean over all ranks and micro-batches."""
    options = {"model": {"type": boosted_cases.WeightedGpt}, "stop": 4}
    alone = boosted_cases.trained_alone(str(tmp_path / "single"), **options)
    for seen in two.run(boosted_runs.trained, plugin, str(tmp_path / "two"), **options):
        # The mean loss of one rank is not that of all ranks, but weights and norms are.
        _require_equal(seen, alone, "rates", "norms")


def test_weights_in_float16_match_a_single_process(two: Ranks, tmp_path: Path) -> None:
    """With a loss scale, the norms of weighted steps agree with those in float32, and every step is taken."""
    options = {"model": {"type": boosted_cases.WeightedGpt}, "stop": 4}
    alone = boosted_cases.trained_alone(str(tmp_path / "single"), **options)
    for seen in two.run(boosted_runs.trained, "zero 1 fp16", str(tmp_path / "two"), **options):
        assert seen["norms"] == pytest.approx(alone["norms"], abs=ROUGH["zero 1 fp16"])
        assert (seen["updates"], seen["attempts"]) == (2, 2)


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 1"])
def test_a_compiled_model_trains_the_same(two: Ranks, single: dict[str, Any], tmp_path: Path, plugin: str) -> None:
    """compile=True compiles the module that the plugin wraps."""
    options = {"compile": {"backend": "aot_eager"}}
    for seen in two.run_within(240, boosted_runs.trained, plugin, str(tmp_path), **options):
        _require_equal(seen, single)


@pytest.mark.parametrize("optimizer", ["HybridAdam", "CPUAdam"])
@pytest.mark.parametrize("plugin", ["zero 1", "torch-ddp"])
def test_colossalai_adam_matches_torch(
    two: Ranks, single: dict[str, Any], tmp_path: Path, plugin: str, optimizer: str
) -> None:
    """ColossalAI's optimizers whose kernels are replaced on the CPU match AdamW."""
    optim = {**OPTIM, "optimizer": {"type": optimizer, "lr": 0.01, "weight_decay": 0.1}}
    for seen in two.run(boosted_runs.trained, plugin, str(tmp_path), optim=optim):
        assert seen["losses"] == pytest.approx(single["losses"], abs=1e-5)
        assert seen["norms"] == pytest.approx(single["norms"], abs=1e-5)


def test_lamb_under_zero_matches_ddp(two: Ranks, tmp_path: Path) -> None:
    """With ZeRO, ColossalAI replaces Lamb with its distributed version, and losses equal those with DDP."""
    optim = {**OPTIM, "optimizer": {"type": "Lamb", "lr": 0.01, "weight_decay": 0.1, "bias_correction": True}}
    spread = two.run(boosted_runs.trained, "zero 1", str(tmp_path / "zero"), optim=optim)
    replicated = two.run(boosted_runs.trained, "torch-ddp", str(tmp_path / "ddp"), optim=optim)
    assert spread[0]["losses"] == pytest.approx(replicated[0]["losses"], abs=1e-4)


@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 1", "zero 2", "hybrid tp 2", "hybrid zero 1 bf16"])
def test_a_nonfinite_update_is_skipped_on_all_ranks(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """If the loss is NaN on one rank, no rank changes its weights, and the step counts as attempted."""
    for seen in two.run(boosted_cases.with_one_nan, plugin, str(tmp_path)):
        assert seen == {"attempts": 2, "updates": 1, "kept": True, "finite": True}


def test_float16_overflows_skip_the_step_and_lower_the_scale(two: Ranks, tmp_path: Path) -> None:
    """A step that overflows counts only as attempted, schedules do not advance, and the scale decreases until a step succeeds."""
    for seen in two.run(boosted_cases.overflowing, str(tmp_path)):
        assert seen["attempts"] == 6
        assert seen["updates"] == seen["attempts"] - seen["skipped"]
        assert 0 < seen["skipped"] < 6
        assert seen["scale"] < 2.0**40
        assert seen["moved"] == seen["updates"]


def test_the_learning_rate_is_scaled_with_the_batch_size(two: Ranks, tmp_path: Path) -> None:
    """auto_scale_lr uses ranks x samples x accumulated micro-batches divided by the base batch size."""
    scaling = {"enable": True, "base_batch_size": 8}
    # 2 ranks x 4 samples x 2 micro-batches = 16, which doubles the rate; the warmup starts at a tenth.
    for seen in two.run(boosted_runs.trained, "zero 1", str(tmp_path), stop=2, auto_scale_lr=scaling):
        assert seen["rates"][0] == pytest.approx(0.01 * 2 * 0.1)


def test_evaluation_may_differ_in_length_between_ranks(two: Ranks, tmp_path: Path) -> None:
    """Predictions have the model's dtype, and ranks may run different numbers of evaluation steps."""
    assert all(two.run(boosted_cases.predicted, "zero 1 bf16", str(tmp_path)))
    assert all(two.run(boosted_cases.predicted, "torch-ddp", str(tmp_path)))


@pytest.mark.parametrize("way", ["two forwards", "in turn", "one forward"])
@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 1", "zero 2", "hybrid"])
def test_gradients_of_several_backward_passes_are_added(two: Ranks, tmp_path: Path, plugin: str, way: str) -> None:
    """The gradients of all backward passes before a step are averaged over the ranks."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "clip_grad": {"max_norm": 0.5}}
    found = two.run(backward_passes.trained, _strategy(plugin), str(tmp_path), way, optim)
    require_equal(found, by_plain_torch(way, max_norm=0.5))


@pytest.mark.parametrize("plugin", ["torch-ddp", "hybrid"])
def test_unsynchronized_gradients_are_averaged_before_an_update(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """A train_step may call loss.backward() and step at any time, because DistributedDataParallel synchronizes gradients."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "accumulative_counts": 4}
    found = two.run(backward_passes.trained, _strategy(plugin), str(tmp_path), "own window", optim)
    require_equal(found, by_plain_torch("own window", window=2))


@pytest.mark.parametrize(("way", "window"), [("by hand", 1), ("own window", 2), ("two forwards", 3)])
def test_zero_rejects_an_update_without_reduced_gradients(two: Ranks, tmp_path: Path, way: str, window: int) -> None:
    """With ZeRO, gradients are reduced only by ``backward`` of the wrapper, in the last pass of a window."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "accumulative_counts": window}
    arguments = (_strategy("zero 1"), str(tmp_path), way, optim)
    for error_message in two.run(boosted_cases.error_message, backward_passes.trained, *arguments):
        assert "StateError: step() was called after" in error_message
        assert "not loss.backward()" in error_message


@pytest.mark.parametrize(("way", "window"), [("a head each", 1), ("a head each", 2), ("a head each, one NaN", 1)])
@pytest.mark.parametrize("plugin", ["torch-ddp", "zero 1", "zero 2", "zero 1 offloaded"])
def test_unused_parameters_do_not_keep_earlier_gradients(
    two: Ranks, tmp_path: Path, plugin: str, way: str, window: int
) -> None:
    """Heads that train alternately take the same steps as in one process, also after a skipped step."""
    strategy = _strategy(plugin)
    if plugin == "torch-ddp":
        strategy["plugin"] = {"type": "torch-ddp", "find_unused_parameters": True}
    optim = {"optimizer": OPTIMIZERS["SGD"], "accumulative_counts": window, "nonfinite": "skip"}
    found = two.run(backward_passes.trained, strategy, str(tmp_path), way, optim)
    require_equal(found, by_plain_torch(way, window=window))


def _strategy(plugin: str) -> dict[str, Any]:
    return {"type": "ColossalAIStrategy", **boosted_runs.PLUGINS[plugin]}


def _require_equal(seen: dict[str, Any], expected: dict[str, Any], *series: str) -> None:
    for name in series or ("losses", "rates", "norms"):
        assert seen[name] == pytest.approx(expected[name], abs=1e-5), name
    for kind in ("weights", "moments"):
        assert sorted(seen[kind]) == sorted(expected[kind])
        for name, value in expected[kind].items():
            torch.testing.assert_close(seen[kind][name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("plugin", ["zero 1", "zero 2"])
@pytest.mark.parametrize("source", ["rank0", "mean"])
def test_evaluations_use_the_buffers_of_the_checkpoint(two: Ranks, tmp_path: Path, plugin: str, source: str) -> None:
    """BatchNorm is evaluated with the same buffers on both ranks, and each rank trains and resumes with its own."""
    strategy = {"type": "ColossalAIStrategy", **boosted_runs.PLUGINS[plugin]}
    batch_norm_runs.require_synced_buffers(two, tmp_path, strategy, source)


@pytest.mark.parametrize("plugin", ["zero 1", "zero 2"])
def test_statistics_of_averaged_weights_are_recomputed_over_all_ranks(two: Ranks, tmp_path: Path, plugin: str) -> None:
    """``EMAHook(update_bn=True)`` computes the statistics of torch's ``update_bn`` for the batches of both ranks."""
    strategy = {"type": "ColossalAIStrategy", **boosted_runs.PLUGINS[plugin]}
    batch_norm_runs.require_recomputed_statistics(two, tmp_path, strategy)
