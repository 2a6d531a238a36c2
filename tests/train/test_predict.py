"""Tests of predictions: their order, their structure, and the files that contain them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from stratagem import Runner
from stratagem.dist import get_rank, get_world_size
from stratagem.errors import ConfigValueError, StratagemError, TrainingError
from stratagem.model import BaseModel
from stratagem.train import EMAHook
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS, TEST, At, Samples, Toy, loader, settings, stop

MakeRunner = Callable[..., Runner]


class Pair(NamedTuple):
    """A tuple with names."""

    first: Any
    second: Any


class Described(BaseModel):
    """Returns nested results of different kinds; ``kind`` selects one of them."""

    def __init__(self, kind: str = "numbers") -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor, classes: Tensor, numbers: Tensor, mode: str = "tensor") -> Any:
        scores = self.layer(inputs)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, classes)}
        return {
            "numbers": {"number": numbers},
            "nested": {"scores": (scores, Pair(numbers, numbers * 2)), "name": [f"sample {n}" for n in numbers]},
            "variable": {"number": numbers, "boxes": [torch.full((int(n), 4), int(n)) for n in numbers]},
            "tensor": scores,
            "half": {"x": scores.bfloat16(), "nothing": None},
            "nan": {"value": numbers / 0},
            "short": {"number": numbers[:-1]},
            "scalar": {"number": numbers, "loss": scores.mean()},
            "object": [object() for _ in numbers],
        }[self.kind]  # fmt: skip


class WithStep(Toy):
    """A model with ``predict_step``."""

    def predict_step(self, batch: Any) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        return {"number": batch[2], "best": self(*batch[:2], None).argmax(1)}


class Stream(IterableDataset[Any]):
    """A stream of 7 samples."""

    def __iter__(self) -> Iterator[Any]:
        samples = Samples()
        yield from (samples[index] for index in range(7))


def numbers(results: Any) -> list[int]:
    return [int(each["number"]) for each in results]


def predict(make_runner: MakeRunner, kind: str, length: int = 5, **options: Any) -> Any:
    return make_runner(model=Described(kind)).predict(loader(length), **options)


def test_results_are_those_of_a_hand_written_loop(make_runner: MakeRunner):
    """Without ``predict_step``, the results are the rows of ``test_step``, here of a model with dropout in evaluation mode."""
    model = Toy()
    results = make_runner(model=model).predict(DataLoader(Samples(5), batch_size=2))
    model.eval()
    scores = model.layers(Samples(5).features)
    assert [each["numbers"].item() for each in results] == [0, 1, 2, 3, 4]
    assert torch.allclose(torch.stack([each["preds"] for each in results]), scores)
    assert [each["target"].item() for each in results] == Samples(5).classes.tolist()
    assert not results[0]["preds"].requires_grad


def test_a_model_with_predict_step_determines_the_results(make_runner: MakeRunner):
    """``predict_step`` runs in evaluation mode without gradients."""
    results = make_runner(model=WithStep()).predict(loader(3))
    assert [sorted(each) for each in results] == [["best", "number"]] * 3
    assert numbers(results) == [0, 1, 2]


def test_nested_results_keep_their_structure(make_runner: MakeRunner):
    """Mappings, tuples and named tuples of tensors and lists are split into the parts of each sample."""
    results = predict(make_runner, "nested")
    assert [each["name"] for each in results] == [f"sample {number}" for number in range(5)]
    scores, pair = results[3]["scores"]
    assert (scores.shape, type(pair), int(pair.first), int(pair.second)) == ((4,), Pair, 3, 6)


def test_results_may_have_different_shapes(make_runner: MakeRunner):
    """A list has one item of any shape for each sample."""
    assert [each["boxes"].shape[0] for each in predict(make_runner, "variable")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (loader(5, shuffle=True, drop_last=True), [0, 1, 2, 3, 4]),
        (DataLoader(Samples(5), batch_size=3, shuffle=True, drop_last=True), [0, 1, 2, 3, 4]),
        (DataLoader(Samples(5), sampler=[3, 1], batch_size=2), [3, 1]),
        ({"dataset": Stream(), "batch_size": 3}, list(range(7))),
        (loader(5, num_workers=2), [0, 1, 2, 3, 4]),
    ],
    ids=["configuration", "shuffled DataLoader", "sampler", "stream", "workers"],
)  # fmt: skip
def test_results_are_in_the_order_of_the_data(make_runner: MakeRunner, data: Any, expected: list[int]):
    """Shuffling and ``drop_last`` have no effect; a sampler keeps its order."""
    assert numbers(make_runner(model=Described()).predict(data)) == expected


def test_the_training_state_does_not_change(make_runner: MakeRunner):
    """A prediction within a training restores the modes of all modules and the generators."""
    model = Toy()
    model.layers[1].eval()
    runner = make_runner(model=model, custom_hooks=[At(2, stop)])
    runner.train()
    modes, before = [each.training for each in model.modules()], torch.get_rng_state()
    assert len(runner.predict(loader(3))) == 3
    assert [each.training for each in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_averaged_weights_are_used_as_in_a_test(make_runner: MakeRunner, tmp_path: Path):
    """With EMAHook, the results are those of the averaged weights of the checkpoint, and otherwise of the trained weights."""
    hooks = {**QUIET_HOOKS, "checkpoint": {"interval": 1}}
    runner = make_runner(custom_hooks=[EMAHook(momentum=0.5)], train_cfg={"max_epochs": 1}, default_hooks=hooks)
    runner.train()
    average = runner.run.events.hooks
    expected = next(each for each in average if isinstance(each, EMAHook)).average
    checkpoint = tmp_path / "run" / "epoch_1"
    plain = make_runner(load_from=checkpoint).predict(loader(3))
    averaged = make_runner(load_from=checkpoint, custom_hooks=[EMAHook(momentum=0.5)]).predict(loader(3))
    model = runner.strategy.unwrap_model().eval()
    assert torch.allclose(plain[0]["preds"], model.layers(Samples(3).features)[0])
    with expected.applied():
        assert torch.allclose(averaged[0]["preds"], model.layers(Samples(3).features)[0])
    assert not torch.equal(plain[0]["preds"], averaged[0]["preds"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"Batch 0 on rank 0: the output\['number'\] is a Tensor of shape \[1\] and has 1 parts.* 2 samples"),
        ("scalar", r"the output\['loss'\] is a Tensor of shape \[\] and is one value"),
    ],
)
def test_an_output_without_parts_for_each_sample_is_rejected(make_runner: MakeRunner, kind: str, message: str):
    """The error names the value, its shape and the number of samples."""
    with pytest.raises(TrainingError, match=message):
        predict(make_runner, kind)


def test_json_lines_have_one_object_for_each_sample(make_runner: MakeRunner, tmp_path: Path):
    """Tensors are lists, and results that are not mappings have a key; NaN is a string, so that the file is valid JSON."""
    path = tmp_path / "results.jsonl"
    assert predict(make_runner, "nested", out=path) is None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"sample {number}" for number in range(5)]
    assert lines[2]["scores"][1] == [2, 4]
    predict(make_runner, "tensor", out=path)
    assert [len(json.loads(line)["prediction"]) for line in path.read_text().splitlines()] == [4] * 5
    predict(make_runner, "nan", out=path, length=2)
    assert path.read_text() == '{"value": "NaN"}\n{"value": "Infinity"}\n'
    assert [each.name for each in tmp_path.iterdir() if each.name != "run"] == ["results.jsonl"]


def test_a_table_has_a_column_for_each_number(make_runner: MakeRunner, tmp_path: Path):
    """Vectors have one column for each element, and the first column is the index of the sample."""
    path = tmp_path / "results.csv"
    predict(make_runner, "nested", out=path)
    rows = list(csv.reader(path.read_text().splitlines()))
    assert rows[0] == ["index", *(f"scores/0_{number}" for number in range(4)), "scores/1/0", "scores/1/1", "name"]
    assert [(row[0], *row[5:]) for row in rows[1:]] == [(str(n), str(n), str(2 * n), f"sample {n}") for n in range(5)]


def test_arrays_have_one_row_for_each_sample(make_runner: MakeRunner, tmp_path: Path):
    """The arrays in the file equal the stacked results, and 16-bit floats are converted to float32."""
    path = tmp_path / "results.npz"
    runner = make_runner(model=Described("half"))
    results = runner.predict(loader(5))
    runner.predict(loader(5), out=path)
    with np.load(path) as arrays:
        assert arrays.files == ["x"]
        assert arrays["x"].dtype == np.float32
        assert np.array_equal(arrays["x"], torch.stack([each["x"].float() for each in results]).numpy())


def test_a_torch_file_contains_the_results(make_runner: MakeRunner, tmp_path: Path):
    """``torch.load`` returns the list of results without executing code."""
    path = tmp_path / "results.pt"
    predict(make_runner, "variable", out=path)
    loaded = torch.load(path, weights_only=True)
    assert numbers(loaded) == [0, 1, 2, 3, 4]
    assert [each["boxes"].tolist() for each in loaded] == [[[n] * 4] * n for n in range(5)]


@pytest.mark.parametrize(
    ("kind", "name", "error", "message"),
    [
        ("numbers", "results.txt", ConfigValueError, "suffix, which must be .jsonl, .csv, .npz, .pt"),
        ("numbers", "missing/results.pt", ConfigValueError, "missing does not exist"),
        ("variable", "results.npz", TrainingError, r"samples 0 and 1 have different .*boxes int64\[0, 4\] and"),
        ("variable", "results.csv", TrainingError, r"boxes of sample 0 has the shape \[0, 4\]"),
        ("nested", "results.npz", TrainingError, "name of sample 0 is a str"),
        ("object", "results.jsonl", TrainingError, "is a object, which this format cannot contain"),
    ],
)
def test_results_that_do_not_fit_a_file_are_rejected(
    make_runner: MakeRunner, tmp_path: Path, kind: str, name: str, error: type[StratagemError], message: str
):
    """The error names the value and a format that can contain it, and no file is left."""
    with pytest.raises(error, match=message):
        predict(make_runner, kind, out=tmp_path / name)
    assert [each.name for each in tmp_path.iterdir() if each.name != "run"] == []


def test_a_prediction_requires_one_set_of_data(make_runner: MakeRunner):
    """Without an argument, ``predict_dataloader`` or ``test_dataloader`` is used, which must be a single set."""
    with pytest.raises(ConfigValueError, match="There is no data to predict"):
        make_runner().predict()
    with pytest.raises(ConfigValueError, match="test_dataloader has the sets a, b"):
        make_runner(**{**TEST, "test_dataloader": {"a": loader(5), "b": loader(2)}}).predict()
    assert len(make_runner(**TEST).predict()) == 5
    assert len(make_runner(**TEST, limit_test_batches=1).predict()) == 2
    assert len(make_runner(**TEST, predict_dataloader=loader(3)).predict()) == 3


def run_predictions(folder: str, strategy: Any, data: Any, kind: str = "variable") -> list[Any]:
    """Predict to a list and to a file on this rank; return the numbers of the samples."""
    runner = Runner(**settings(work_dir=folder, strategy=strategy, model=Described(kind)))
    try:
        results = [
            runner.predict(data() if callable(data) else data, out=out) for out in (None, f"{folder}/results.jsonl")
        ]
        lines = Path(folder, "results.jsonl").read_text().splitlines() if get_rank() == 0 else []
        shapes = [len(each["boxes"]) for each in results[0] or ()]
        assert [len(json.loads(line)["boxes"]) for line in lines] == shapes
        return [None if results[0] is None else numbers(results[0]), numbers(map(json.loads, lines)), results[1]]
    finally:
        runner.close()


def split_loader() -> DataLoader[Any]:
    """Return a loader whose torch sampler is already split across the ranks, with padding."""
    return DataLoader(Samples(5), sampler=DistributedSampler(Samples(5), shuffle=False), batch_size=2)


def batch_loader() -> DataLoader[Any]:
    """Return a loader with batches of different sizes, which are distributed whole."""
    return DataLoader(Samples(6), batch_sampler=[[0], [1, 2, 3], [4, 5]])


@pytest.mark.parametrize(
    ("strategy", "data", "count"),
    [
        ("ddp", loader(5), 5),
        ("ddp", loader(1), 1),
        ("ddp", {"dataset": Stream(), "batch_size": 2}, 7),
        ("ddp", split_loader, 5),
        ("ddp", batch_loader, 6),
        ({"type": "fsdp", "wrap_policy": "Linear"}, loader(5), 5),
        ({"type": "fsdp", "wrap_policy": "Linear"}, loader(1), 1),
        ({"type": "fsdp", "wrap_policy": "Linear"}, {"dataset": Stream(), "batch_size": 2}, 7),
        ({"type": "fsdp", "tp": 2, "tp_plan": {"layer": "colwise"}}, loader(5), 5),
    ],
    ids=["DDP", "one sample", "stream", "split", "batches", "FSDP", "FSDP one sample", "FSDP stream", "TP"],
)
def test_two_ranks_predict_each_sample_once_in_order(
    ranks: Ranks, tmp_path: Path, strategy: Any, data: Any, count: int
):
    """Rank 0 has all results in the order of the data, in memory and in the file, and rank 1 returns None."""
    first, second = ranks.run(run_predictions, str(tmp_path), strategy, data)
    assert first == [list(range(count)), list(range(count)), None]
    assert second == [None, [], None]


class Quarter(Stream):
    """A stream that is already split across the ranks."""

    def __init__(self) -> None:
        self.rank, self.num_replicas = get_rank(), get_world_size()


def refused_message(folder: str) -> str:
    """Return the error for a stream that is already split."""
    runner = Runner(**settings(work_dir=folder, strategy="ddp", model=Described()))
    try:
        with pytest.raises(ConfigValueError) as raised:
            runner.predict({"dataset": Quarter(), "batch_size": 2})
        return str(raised.value)
    finally:
        runner.close()


def test_data_that_is_already_split_in_an_unknown_way_is_rejected(ranks: Ranks, tmp_path: Path):
    """The order of the results would be unknown, so both ranks raise an error."""
    first, second = ranks.run(refused_message, str(tmp_path))
    assert first == second
    assert "already split across the ranks" in first
