"""FSDPStrategy: errors before the first step, and supported kinds of models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from stratagem.dist import get_rank
from stratagem.errors import LaunchError, StratagemError
from stratagem.model import BaseModel
from stratagem.optim import OptimWrapper
from stratagem.registry import STRATEGIES
from stratagem.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from tests.support.ranks import Ranks
from tests.support.sharded_runs import OPTIM, TP_PLAN, Gpt, full, prepared
from tests.support.small_runs import Mlp, batch


def make(folder: str, **options: Any) -> FSDPStrategy:
    """Return a strategy with seed 0."""
    return FSDPStrategy(
        work_dir=folder, env_kwargs={"randomness": {"seed": 0}}, log_kwargs={"log_level": "ERROR"}, **options
    )


class Differs(Mlp):
    """A model with a different data type on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        if get_rank() == 1:
            self.layers[2].to(torch.bfloat16)


class Looks(Mlp):
    """A model whose constructor reads the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.layers[0].weight.sum().item()


class Forgets(Mlp):
    """A model with an uninitialized parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(4))


def rejected(folder: str, cases: Mapping[str, tuple[Any, dict[str, Any]]]) -> dict[str, str]:
    """Prepare each (model, options) pair and return the errors."""
    errors = {}
    for name, (model, options) in cases.items():
        compiling = options.pop("compile", False)
        try:
            strategy = make(folder, **options)
        except (StratagemError, TypeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
            continue
        try:
            strategy.prepare({"type": model}, compile=compiling)
            errors[name] = "nothing was refused"
        except StratagemError as error:
            errors[name] = f"{type(error).__name__}: {error}"
        finally:
            strategy.close()
    return errors


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "policy": (Gpt, {"wrap_policy": "Blok"}, "ConfigValueError: wrap_policy: no submodule .* Did you mean 'Block'"),
    "mesh": (Gpt, {"replicate": 3}, r"PlacementError: replicate=3 x tp=1 does not divide the 2 processes"),
    "no rank": (Gpt, {"tp": 0}, "ConfigTypeError: tp must be the number of ranks, an integer >= 1, got 0"),
    "DDP's option": (
        Gpt,
        {"find_unused_parameters": True},
        "PlacementError: find_unused_parameters is an option of DDPStrategy",
    ),
    "misspelled": (
        Gpt,
        {"mixed_precison": "bfloat16"},
        r"ConfigTypeError: FSDPStrategy takes no argument 'mixed_precison'. Did you mean 'mixed_precision'\?",
    ),
    "types": (
        Differs,
        {},
        r"PlacementError: .* in 2 tensors: 'layers.2.weight' is torch.float32 of shape \[3, 8\] on rank 0 and torch.bfloat16",
    ),
    "looks": (Looks, {}, r"PlacementError: The model cannot be built on the meta device: .*initial_weights='whole'"),
    "forgets": (Forgets, {}, "PlacementError: 1 tensors of the model are never initialized: gate"),
    "tie": (
        Gpt,
        {"wrap_policy": "Embedding"},
        "PlacementError: wrap_policy selects 'words', which shares a weight with",
    ),
    "reshard": (Gpt, {"reshard_after_forward": 3}, "PlacementError: reshard_after_forward=3: .* divide the 2"),
    "reshard of nobody": (
        Gpt,
        {"reshard_after_forward": {"block.0": True}},
        r"ConfigValueError: reshard_after_forward: no wrapped module matches 'block\.0'. Did you mean 'blocks\.0'",
    ),
    "ignored": (Gpt, {"ignored": ["hed"]}, "ConfigValueError: ignored: no module or parameter matches 'hed'"),
    "checkpointing": (
        Mlp,
        {"activation_checkpointing": True},
        "ConfigValueError: activation_checkpointing=True selects no module of Mlp. Name the modules",
    ),
    "operator": (
        Gpt,
        {"activation_checkpointing": {"save_ops": ["mmm"]}},
        "ConfigValueError: activation_checkpointing: unknown operator 'mmm'. Did you mean 'bmm' or 'mm'",
    ),
    "compile": (
        Mlp,
        {"compile_blocks": True},
        "ConfigValueError: compile_blocks compiles the modules that wrap_policy selects",
    ),
    "compiled step": (
        Mlp,
        {"compile": {"target": "train_step", "backend": "eager"}},
        "PlacementError: compile: target='train_step' cannot be used under FSDP",
    ),
    "method": (
        Gpt,
        {"forward_methods": ["blocks.0.up.run"]},
        "ConfigValueError: forward_methods: .* 'blocks.0.up.run'",
    ),
    "unwrapped method": (
        Gpt,
        {"forward_methods": ["norm.extra_repr"]},
        "ConfigValueError: forward_methods: 'norm.extra_repr' is a method of a module that is not wrapped",
    ),
    "no plan": (
        Gpt,
        {"tp": 2},
        "PlacementError: tp=2 shards layers across ranks, but there is no plan for it. Set tp_plan",
    ),
    "plan for nobody": (
        Gpt,
        {"tp": 2, "tp_plan": {"blocks.*.uo": "colwise"}},
        r"ConfigValueError: tp_plan: no module matches 'blocks\.\*\.uo'",
    ),
    "style": (
        Gpt,
        {"tp": 2, "tp_plan": {"blocks.*.up": "columns"}},
        "ConfigValueError: tp_plan: unknown style 'columns'",
    ),
    "odd": (Mlp, {"tp": 2, "tp_plan": {"layers.2": "colwise"}}, "PlacementError: tp_plan: 'layers.2' has 3 outputs"),
    "dropout": (
        Gpt,
        {"tp": 2, "tp_plan": TP_PLAN, "env_kwargs": {"randomness": {"diff_rank_seed": True}}},
        "PlacementError: randomness: with diff_rank_seed=True, the ranks of a tensor-parallel group",
    ),
    "SyncBN": (Gpt, {"sync_bn": "torch"}, "PlacementError: torch's SyncBatchNorm requires an accelerator"),
}


def refused_all(folder: str) -> dict[str, str]:
    """Try every case of :data:`REFUSED`."""
    cases = {name: (model, dict(options)) for name, (model, options, _) in REFUSED.items()}
    env = cases["dropout"][1].pop("env_kwargs")
    errors = rejected(folder, {name: case for name, case in cases.items() if name != "dropout"})
    try:
        FSDPStrategy(work_dir=folder, env_kwargs=env, **cases["dropout"][1])
    except StratagemError as error:
        errors["dropout"] = f"{type(error).__name__}: {error}"
    return errors


def test_invalid_setups_are_rejected_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    """Invalid policies, meshes and options, and ranks that differ, raise errors on every rank before the first step."""
    for errors in ranks.run(refused_all, str(tmp_path)):
        unlike = {
            name: errors[name] for name, (_, _, text) in REFUSED.items() if not re.match(f"(?s){text}", errors[name])
        }
        assert unlike == {}


def test_one_process_without_a_launcher_is_rejected(tmp_path: Path) -> None:
    """In a single process, the error contains the command to start several."""
    with pytest.raises(LaunchError, match="FSDPStrategy requires a launcher"):
        FSDPStrategy(work_dir=tmp_path)
    assert STRATEGIES.get("FSDPStrategy") is FSDPStrategy


class Parts(BaseModel):
    """Two parts with separate optimizers, one of which accumulates over two iterations."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        """Return the result of the judge for the maker's output."""
        return self.judge(torch.tanh(self.maker(x)))

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train the judge on the batch, then the maker with the judge."""
        with optim_wrapper["judge"].optim_context(self):
            judged = self.judge(torch.tanh(self.maker(data).detach())).square().mean()
        optim_wrapper["judge"].update_params(judged)
        with optim_wrapper["maker"].optim_context(self):
            made = self.judge(torch.tanh(self.maker(data))).mean()
        optim_wrapper["maker"].update_params(made)
        return {"loss": (judged + made).detach()}


def trained_parts(kind: type[Any], folder: str) -> dict[str, Any]:
    """Train 6 iterations; return the unsharded parameters."""
    options = {"model_wrapper": "separate"} if kind is DDPStrategy else {"wrap_policy": "Linear"}
    strategy = kind(
        work_dir=folder, env_kwargs={"randomness": {"seed": 0}}, log_kwargs={"log_level": "ERROR"}, **options
    )
    adam = {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}}
    optim = {
        "constructor": "MultiOptimWrapperConstructor",
        "maker": {**adam, "accumulative_counts": 2},
        "judge": adam,
    }
    strategy.prepare({"type": Parts}, optim_wrapper=optim, dispatch_kwargs={"max_iters": 6})
    data = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(1))
    for x in data:
        strategy.model.train_step(x[strategy.rank :: 2], optim_wrapper=strategy.optim_wrapper)
    parameters = strategy.unwrap_model().named_parameters()
    found = {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in parameters
    }
    strategy.close()
    return found


def test_several_optimizers_with_separate_windows(ranks: Ranks, tmp_path: Path) -> None:
    """Parts that are called separately, one with accumulation, give the same results as under DDP."""
    sharded, _ = ranks.run(trained_parts, FSDPStrategy, str(tmp_path / "fsdp"))
    replicated, _ = ranks.run(trained_parts, DDPStrategy, str(tmp_path / "ddp"))
    assert sharded.keys() == replicated.keys()
    for name, value in sharded.items():
        torch.testing.assert_close(value, replicated[name], rtol=1e-5, atol=1e-6)


class Encodes(Mlp):
    """A model that is trained through a custom method."""

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""
        return self.layers[2](torch.tanh(self.layers[0](inputs)))

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train without ``self(...)``."""
        loss = nn.functional.cross_entropy(self.encode(data[0]), data[1])
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}


def encoded(folder: str, methods: list[str]) -> str:
    """Train one step; return its loss, or the error."""
    strategy = make(folder, forward_methods=methods)
    strategy.prepare({"type": Encodes}, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}})
    inputs, targets = batch()
    try:
        return str(strategy.model.train_step((inputs, targets), optim_wrapper=strategy.optim_wrapper)["loss"].item())
    except StratagemError as error:
        return str(error)
    finally:
        strategy.close()


def test_methods_that_use_parameters_must_be_listed(ranks: Ranks, tmp_path: Path) -> None:
    """A method that uses parameters must be listed in ``forward_methods``; otherwise it raises an error."""
    for message in ranks.run(encoded, str(tmp_path), []):
        assert "Encodes.train_step used parameters of Encodes that were not gathered" in message
        assert "forward_methods=" in message
    # One process has the same loss for the same samples.
    first, second = ranks.run(encoded, str(tmp_path), ["encode"])
    assert float(first) == float(second) > 0


def with_built_optimizer(folder: str, model: Any) -> tuple[float, bool]:
    """Train two steps with an optimizer instance; return the smallest change, and whether it uses the shards."""
    strategy = make(folder)
    strategy.prepare(model, optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.5)))
    before = [parameter.full_tensor().clone() for parameter in strategy.model.parameters()]
    for _ in range(2):
        strategy.model.train_step(batch(), optim_wrapper=strategy.optim_wrapper)
    after = [parameter.full_tensor() for parameter in strategy.model.parameters()]
    strategy.close()
    stepped = {id(each) for group in strategy.optim_wrapper.param_groups for each in group["params"]}
    return min((a - b).abs().max().item() for a, b in zip(before, after, strict=True)), stepped == {
        id(parameter) for parameter in strategy.model.parameters()
    }


def built_before(folder: str) -> Any:
    """Pass a model and an optimizer instance to the strategy."""
    return with_built_optimizer(folder, Mlp())


def test_an_optimizer_instance_steps_the_shards(ranks: Ranks, tmp_path: Path) -> None:
    """The parameters of an optimizer instance are replaced by the shards with the same names."""
    for moved, exact in ranks.run(built_before, str(tmp_path)):
        assert moved > 0
        assert exact


class Normed(torch.optim.Optimizer):
    """SGD whose learning rate is divided by the largest gradient norm, read with ``item()``."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        largest = max(param.grad.norm().item() for param in params)
        for param in params:
            if (param.grad.abs() > largest / 4).any():
                param.sub_(param.grad, alpha=self.param_groups[0]["lr"] / largest)


class EvaluationMode(torch.optim.SGD):
    """SGD whose ``train()`` reads the state of each parameter, like the optimizers of schedulefree."""

    def train(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                assert "z" not in self.state[param]

    eval = train


def stepped(folder: str, kind: Any) -> dict[str, Tensor]:
    """Train three iterations of the global batch with ``Normed``; return the full weights."""
    env = {"randomness": {"seed": 0}}
    strategy = kind(work_dir=folder, env_kwargs=env, log_kwargs={"log_level": "ERROR"})
    model, optim = strategy.prepare({"type": Mlp}, optim_wrapper={"optimizer": {"type": Normed}})
    inputs, targets = batch(8)
    share = slice(get_rank(), None, strategy.dp_size)
    for _ in range(3):
        model.train_step((inputs[share], targets[share]), optim)
    weights = {name: full(weight) for name, weight in strategy.unwrap_model().named_parameters()}
    strategy.close()
    return weights


def test_an_optimizer_that_reads_values_makes_the_steps_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    """``item()``, ``float()`` and conditions refer to whole tensors rather than to the shards of a rank."""
    expected = stepped(str(tmp_path), SingleDeviceStrategy)
    for weights in ranks.run(stepped, str(tmp_path), FSDPStrategy):
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def with_empty_state(folder: str) -> float:
    """Prepare an optimizer whose state has an empty entry for each parameter, and make a step."""
    model = Mlp()
    optimizer = EvaluationMode(model.parameters(), lr=0.1)
    optimizer.train()
    strategy = make(folder)
    model, optim = strategy.prepare(model, optim_wrapper=optimizer)
    before = full(model.layers[0].weight)
    model.train_step(batch(4), optim)
    changed = float((full(model.layers[0].weight) - before).abs().sum())
    strategy.close()
    return changed


def test_an_optimizer_with_an_empty_state_is_new(ranks: Ranks, tmp_path: Path) -> None:
    """An optimizer that read the state of its parameters before the first step is not rejected."""
    first, second = ranks.run(with_empty_state, str(tmp_path))
    assert first == second > 0


def without_weights(folder: str) -> tuple[str, float]:
    """Train without weights, then with loaded ones."""
    saved = make(folder)
    saved.prepare({"type": Mlp})
    saved.save_checkpoint(f"{folder}/weights")
    saved.close()
    strategy = make(folder, skip_init_weights=True)
    strategy.prepare({"type": Mlp}, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}})
    try:
        strategy.model.train_step(batch(), optim_wrapper=strategy.optim_wrapper)
        message = "nothing was refused"
    except StratagemError as error:
        message = str(error)
    strategy.load_checkpoint(f"{folder}/weights")
    loss = strategy.model.train_step(batch(), optim_wrapper=strategy.optim_wrapper)["loss"].item()
    strategy.close()
    return message, loss


def test_training_without_weights_is_an_error(ranks: Ranks, tmp_path: Path) -> None:
    """With skip_init_weights, a step before any weights are loaded raises an error."""
    for message, loss in ranks.run(without_weights, str(tmp_path)):
        assert message.startswith("skip_init_weights=True left the model uninitialized")
        assert 0 < loss < 10


def loaded_wrongly(folder: str) -> tuple[str, bool]:
    """Load a state with different shapes; return the error, and whether the model is unchanged."""
    strategy = make(folder)
    strategy.prepare({"type": Mlp})
    before = {name: value.full_tensor().clone() for name, value in strategy.unwrap_model().state_dict().items()}
    try:
        strategy.load_model_state_dict({name: value[:1] for name, value in before.items()}, strict=True)
        message = "nothing was refused"
    except StratagemError as error:
        message = str(error)
    same = all(
        torch.equal(value.full_tensor(), before[name]) for name, value in strategy.unwrap_model().state_dict().items()
    )
    strategy.close()
    return message, same


def test_a_state_with_different_shapes_is_rejected(ranks: Ranks, tmp_path: Path) -> None:
    """A state with different shapes raises an error with the unsharded shapes, and the model is not modified."""
    for message, same in ranks.run(loaded_wrongly, str(tmp_path)):
        assert "layers.0.weight (saved [1, 4], model [8, 4])" in message
        assert same


def dropped_window(folder: str) -> list[float]:
    """Discard a window of accumulated gradients; return the norms of the next update with and without it."""
    norms = []
    for drop in (False, True):
        strategy = make(folder)
        strategy.prepare(
            {"type": Mlp},
            optim_wrapper={
                "optimizer": {"type": "SGD", "lr": 0.0},
                "accumulative_counts": 2,
                "clip_grad": {"max_norm": 9.0},
            },
            dispatch_kwargs={"max_iters": 8},
        )
        step, optim = strategy.model.train_step, strategy.optim_wrapper
        if drop:
            step(batch(), optim_wrapper=optim)
            optim.discard_accumulation()
            # The next window is the short one that ends where the second would have ended.
        for _ in range(3 if drop else 2):
            step(batch(), optim_wrapper=optim)
        norms.append(optim.grad_norm.item())
        strategy.close()
    return norms


def test_a_discarded_window_leaves_no_gradients(ranks: Ranks, tmp_path: Path) -> None:
    """Gradients that have not been synchronized are discarded with their window."""
    for clean, after in ranks.run(dropped_window, str(tmp_path)):
        assert after == pytest.approx(clean, rel=1e-6)


def averaged(folder: str) -> list[float]:
    """Evaluate with the original weights, with modified shards, and with restored weights."""
    strategy = prepared("FSDP x2", folder, optim=OPTIM)
    model = strategy.model
    words = torch.arange(14).reshape(2, 7)
    scores = []
    for factor in (1.0, 0.0, None):
        if factor is not None:
            kept = [parameter.detach().clone() for parameter in model.parameters()]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(factor)
        with torch.no_grad():
            scores.append(model.val_step((words, torch.zeros(2)))["scores"].abs().sum().item())
        if factor is not None:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), kept, strict=True):
                    parameter.copy_(value)
    strategy.close()
    return scores


def test_an_evaluation_uses_the_current_weights(ranks: Ranks, tmp_path: Path) -> None:
    """Each evaluation gathers the current weights in the shards, such as swapped-in averages."""
    for own, nothing, restored in ranks.run(averaged, str(tmp_path)):
        assert own == restored > 0
        assert nothing == 0.0


def gathers(folder: str) -> list[int]:
    """Return the number of all-gathers in a training step, for three values of ``reshard_after_forward``."""
    found = []
    for reshard in (None, True, {"layers.2": True}):
        strategy = make(folder, wrap_policy="Linear", reshard_after_forward=reshard)
        model, optim = strategy.prepare(Mlp(), optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}})
        step = model.train_step
        step(batch(), optim)
        with profile() as recorded:
            step(batch(), optim)
        found.append(sum(event.count for event in recorded.key_averages() if event.key == "c10d::_allgather_base_"))
        strategy.close()
    return found


def test_the_last_wrapped_module_is_gathered_once_per_step(ranks: Ranks, tmp_path: Path) -> None:
    """The backward pass begins with the last module, so its parameters are kept; with an explicit True, they are freed."""
    for found in ranks.run(gathers, str(tmp_path)):
        assert found == [3, 4, 4]
