"""The samples, tokens and optimizer steps per second in the records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from stratagem import Runner
from stratagem.data import build_dataloader
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.model import BaseModel
from stratagem.train import LoggerHook
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS, Samples, Toy, loader, settings

MakeRunner = Callable[..., Runner]


def counted(runner: Runner) -> list[dict[str, int]]:
    """Train; return what was counted for each line: the rates multiplied by the duration of the iterations."""
    runner.train()
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    found, before = [], 0
    for record in (record for record in map(json.loads, lines) if record["mode"] == "train"):
        seconds, before = record["time"] * (record["iter"] - before), record["iter"]
        rates = {name: value for name, value in record.items() if name.endswith("_per_second")}
        found.append({name.removesuffix("_per_second"): round(rate * seconds) for name, rate in rates.items()})
    return found


def hooks(interval: int, **logger: Any) -> dict[str, Any]:
    """Return the default hooks with a logger."""
    return {**QUIET_HOOKS, "logger": {"interval": interval, **logger}}


class Words(BaseModel):
    """A model of mappings with ``input_ids``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 1)

    def forward(self, input_ids: Tensor, mode: str = "tensor", **_: Any) -> Any:
        return {"loss": self.embedding(input_ids).mean()}


class CountedWords(Words):
    """A model that counts ten samples and seven tokens in each batch."""

    def count_samples(self, batch: Mapping[str, Any]) -> int:
        return 10

    def count_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.tensor(7)


def texts(**entries: Tensor) -> dict[str, Any]:
    """Return a loader of four texts of three tokens, in batches of two."""
    columns = {"input_ids": torch.ones(4, 3, dtype=torch.int64), **entries}
    rows = [{name: column[row] for name, column in columns.items()} for row in range(4)]
    return loader(dataset=rows)


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_iters": 14}])
def test_a_smaller_last_batch_counts_with_its_samples(make_runner: MakeRunner, length: dict[str, int]) -> None:
    """Of 13 samples in batches of 2, iterations 5 to 8 have 2 + 2 + 1 + 2, however the length of the run is given."""
    found = counted(make_runner(default_hooks=hooks(4), train_cfg=length))
    assert [line["samples"] for line in found] == [8, 7, 8]


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(("limit", "samples"), [(3, 6), (7, 13)])
def test_batches_beyond_a_limit_are_not_counted(make_runner: MakeRunner, limit: int, samples: int) -> None:
    """Three batches of an epoch have six samples; a limit of all seven batches includes the smaller last one."""
    runner = make_runner(default_hooks=hooks(limit), train_cfg={"max_epochs": 2}, limit_train_batches=limit)
    assert [line["samples"] for line in counted(runner)] == [samples, samples]


def test_steps_are_optimizer_steps_under_accumulation(make_runner: MakeRunner) -> None:
    """Twelve iterations with two micro-batches per step are six steps, and all samples count."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 2}
    found = counted(make_runner(default_hooks=hooks(6), optim_wrapper=optim, train_cfg={"max_iters": 12}))
    assert found == [{"samples": 12, "steps": 3}, {"samples": 11, "steps": 3}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "tokens"), [(None, 12), (torch.tensor([[1, 1, 0]] * 4), 8), (torch.ones(4, dtype=torch.int64), 12)]
)
def test_input_ids_are_tokens_except_where_they_are_masked(
    make_runner: MakeRunner, mask: Tensor | None, tokens: int
) -> None:
    """Four texts of three tokens; a mask with the shape of the tokens excludes one of each, another mask is ignored."""
    data = texts() if mask is None else texts(attention_mask=mask)
    runner = make_runner(model=Words(), train_dataloader=data, train_cfg={"max_iters": 2}, default_hooks=hooks(2))
    assert counted(runner) == [{"samples": 4, "tokens": tokens, "steps": 2}]


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "tokens"),
    [("valid", 4), ("input_ids", 12), (lambda batch: batch["input_ids"].sum() * 5, 60), (False, None)],
)
def test_an_option_specifies_the_tokens(make_runner: MakeRunner, spec: Any, tokens: int | None) -> None:
    """A boolean entry counts where it is True, any other with all elements, a function with its result."""
    data = texts(valid=torch.tensor([[True, False, False]] * 4))
    logger = hooks(2, tokens=spec)
    runner = make_runner(model=Words(), train_dataloader=data, train_cfg={"max_iters": 2}, default_hooks=logger)
    assert counted(runner)[0].get("tokens") == tokens


def test_a_model_counts_its_samples_and_tokens(make_runner: MakeRunner) -> None:
    """The methods of the model have precedence over the sampler and over ``input_ids``."""
    runner = make_runner(
        model=CountedWords(), train_dataloader=texts(), train_cfg={"max_iters": 2}, default_hooks=hooks(2)
    )
    assert counted(runner) == [{"samples": 20, "tokens": 14, "steps": 2}]


def group_loader(collate: Any) -> dict[str, Any]:
    """Return a loader of batches of one group each: 2, 1, 2, 2 and 1 samples."""
    sampler = {"type": "GroupedBatchSampler", "groups": [0] * 3 + [1] * 5, "batch_size": 2, "shuffle": False}
    return {"dataset": Samples(8), "batch_sampler": sampler, "collate_fn": collate}


def own_collate(samples: Sequence[Any]) -> Any:
    """Collate as by default, but in a function that nobody knows."""
    return default_collate(samples)


@pytest.mark.slow
def test_batches_of_groups_count_with_their_samples(make_runner: MakeRunner) -> None:
    """The five batches of an epoch contain eight samples."""
    data = group_loader({"type": "default_collate"})
    found = counted(make_runner(train_dataloader=data, default_hooks=hooks(5), train_cfg={"max_epochs": 1}))
    assert found == [{"samples": 8, "steps": 5}]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "samples"), [(None, None), (1, 8)])
def test_samples_of_an_unknown_collate_function_are_not_guessed(
    make_runner: MakeRunner, spec: int | None, samples: int | None
) -> None:
    """The sizes are unknown unless an option names an entry of the batch; a log line describes what to do."""
    logger = hooks(5, samples=spec)
    runner = make_runner(
        train_dataloader=group_loader(own_collate),
        default_hooks=logger,
        train_cfg={"max_epochs": 1},
        log_level="INFO",
    )
    assert counted(runner)[0].get("samples") == samples
    text = next(Path(runner.strategy.log_dir).glob("*.log")).read_text()
    assert ("samples/s is not logged" in text) == (spec is None)


def test_an_entry_that_a_batch_does_not_have_is_an_error(make_runner: MakeRunner) -> None:
    """The message lists the entries of the batch."""
    runner = make_runner(model=Words(), train_dataloader=texts(), default_hooks=hooks(2, tokens="tokens"))
    with pytest.raises(ConfigValueError, match=r"no entry 'tokens' to count; it has the keys input_ids"):
        runner.train()
    with pytest.raises(ConfigTypeError, match="expected tokens to be the key or index"):
        LoggerHook(tokens=True)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "consumed"), [(4, ()), (4, ((4, 2),)), (3, ((4, 1),)), (5, ((2, 3),)), (13, ())]
)
def test_the_loader_knows_its_last_batch(batch_size: int, consumed: Any, drop_last: bool) -> None:
    """Its index and size are those of the last batch that is yielded, also after a change of the batch size."""
    data = build_dataloader(
        {"dataset": Samples(13), "batch_size": batch_size, "drop_last": drop_last}, seed=0, training=True
    )
    start = data.resume_at(0, 0, consumed) if consumed else 0
    sizes = {start + index: len(batch[0]) for index, batch in enumerate(data.batches(0, start))}
    assert data.last_batch(0) == list(sizes.items())[-1]
    assert set(list(sizes.values())[:-1]) <= {batch_size}


def train_on_ranks(folder: str, **changes: Any) -> list[dict[str, int]]:
    """Train on this rank; return what rank 0 counted."""
    runner = Runner(**settings(work_dir=folder, default_hooks=hooks(3), train_cfg={"max_iters": 3}, **changes))
    try:
        if runner.strategy.rank:
            runner.train()
            return []
        return counted(runner)
    finally:
        runner.close()


def test_the_samples_of_all_ranks_are_counted(tmp_path: Path, ranks: Ranks) -> None:
    """Rank 0 has batches of 2, 2 and 1 samples, and rank 1 of 1, 2 and 2 (the last one is repeated)."""
    data = group_loader({"type": "default_collate"})
    found = ranks.run(train_on_ranks, str(tmp_path), strategy="DDPStrategy", train_dataloader=data)
    assert found[0] == [{"samples": 10, "steps": 3}]


def test_ranks_of_one_tensor_parallel_group_are_counted_once(tmp_path: Path, ranks: Ranks) -> None:
    """Both ranks process the same three batches of two samples."""
    strategy = {"type": "FSDPStrategy", "tp": 2, "tp_plan": {"layers.0": "colwise", "layers.3": "rowwise"}}
    found = ranks.run(train_on_ranks, str(tmp_path), strategy=strategy, model=Toy())
    assert found[0] == [{"samples": 6, "steps": 3}]
