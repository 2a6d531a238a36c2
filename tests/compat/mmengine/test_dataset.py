"""Tests of the datasets, samplers and metrics of the MMEngine layer."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.compat.mmengine.dataset import (
    BaseDataset,
    ClassBalancedDataset,
    Compose,
    ConcatDataset,
    DefaultSampler,
    InfiniteSampler,
    RepeatDataset,
    default_collate,
    pseudo_collate,
)
from stratagem.compat.mmengine.evaluator import BaseMetric, DumpResults, Evaluator, get_metric_value
from stratagem.errors import ConfigValueError


class Categories(BaseDataset):
    """A dataset with one category per sample."""

    def get_cat_ids(self, idx: int) -> list[int]:
        return [self.get_data_info(idx)["category"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the annotations of four samples, of which one has the category 1."""
    samples = [{"img_path": f"{number}.png", "category": int(number == 3)} for number in range(4)]
    (tmp_path / "ann.json").write_text(json.dumps({"metainfo": {"classes": ["a", "b"]}, "data_list": samples}))
    return tmp_path


def load(folder: Path, **options: Any) -> Categories:
    """Return the dataset in a folder."""
    return Categories("ann.json", data_root=str(folder), data_prefix={"img_path": "imgs"}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("serialize_data", [True, False])
def test_a_sample_has_its_path_and_index(folder: Path, serialize_data: bool) -> None:
    """Paths are joined with the root and the prefix, and a negative index counts from the end."""
    dataset = load(folder, serialize_data=serialize_data)
    assert dataset.metainfo == {"classes": ["a", "b"]}
    assert dataset[-1] == {"img_path": str(folder / "imgs" / "3.png"), "category": 1, "sample_idx": 3}
    assert dataset[-4]["sample_idx"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("serialize_data", [True, False])
@pytest.mark.parametrize(("indices", "expected"), [(2, [0, 1]), (-1, [3]), ([3, -3], [3, 1])])
def test_subsets_contain_the_chosen_samples(
    folder: Path, serialize_data: bool, indices: Any, expected: list[int]
) -> None:
    """A subset is the first samples, the last ones, or those with given indices; the dataset is unchanged."""
    dataset = load(folder, serialize_data=serialize_data)
    subset = dataset.get_subset(indices)
    paths = [Path(subset[number]["img_path"]).stem for number in range(len(subset))]
    assert paths == [str(number) for number in expected]
    assert len(dataset) == 4


@pytest.mark.slow
def test_another_sample_replaces_one_without_result(folder: Path) -> None:
    """If the transforms return None, another sample is tried, but not in test mode."""
    only_last = [lambda info: info if info["category"] else None]
    assert load(folder, pipeline=only_last)[0]["category"] == 1
    with pytest.raises(Exception, match="sample 0"):
        load(folder, pipeline=only_last, test_mode=True)[0]


def test_transforms_stop_at_none() -> None:
    """The transforms after one that returns None are not called."""
    assert Compose([lambda data: data + 1, lambda data: data * 2])(1) == 4
    assert Compose([lambda data: None, lambda data: data * 2])(1) is None


@pytest.mark.slow
def test_datasets_are_combined(folder: Path) -> None:
    """Concatenated, repeated and balanced datasets return the samples of the datasets that they contain."""
    dataset = load(folder)
    joined = ConcatDataset([dataset, load(folder, indices=1)])
    assert (len(joined), joined[4]["sample_idx"], joined[-1]["sample_idx"]) == (5, 0, 0)
    repeated = RepeatDataset(dataset, 2)
    assert (len(repeated), repeated[5]["sample_idx"]) == (8, 1)
    # The category 1 has the frequency 1/4, so its sample is used sqrt(1 / (1/4)) = 2 times.
    balanced = ClassBalancedDataset(dataset, oversample_thr=1.0)
    assert [balanced[number]["sample_idx"] for number in range(len(balanced))] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_different_metainfo_is_refused(folder: Path) -> None:
    """Datasets with different classes cannot be concatenated, unless the key is ignored."""
    datasets = [load(folder), load(folder, metainfo={"classes": ["c"]})]
    with pytest.raises(ConfigValueError, match="classes"):
        ConcatDataset(datasets)
    assert len(ConcatDataset(datasets, ignore_keys="classes")) == 8


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    """The samples are shuffled with torch's generator, seeded with the sum of seed and epoch."""
    sampler = DefaultSampler(range(10), seed=3)
    sampler.set_epoch(2)
    assert list(sampler) == torch.randperm(10, generator=torch.Generator().manual_seed(5)).tolist()


def test_the_endless_order_continues_after_skipped_samples() -> None:
    """Skipping samples gives the same order as drawing them."""
    expected = list(islice(InfiniteSampler(range(5), seed=1), 12))
    sampler = InfiniteSampler(range(5), seed=1)
    sampler.skip(7)
    assert list(islice(sampler, 5)) == expected[7:]
    assert sorted(expected[:5]) == list(range(5))


def test_batches_keep_the_structure_of_samples() -> None:
    """pseudo_collate makes lists of the values, and default_collate stacks tensors."""
    samples = [{"inputs": torch.tensor([number]), "name": str(number)} for number in range(2)]
    assert pseudo_collate(samples)["name"] == ["0", "1"]
    assert [each.item() for each in pseudo_collate(samples)["inputs"]] == [0, 1]
    assert default_collate(samples)["inputs"].tolist() == [[0], [1]]


class Mean(BaseMetric):
    """The mean of the predictions."""

    default_prefix = "test"

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {"mean": sum(results) / len(results)}


def test_metrics_have_a_prefix_and_ignore_repeated_samples() -> None:
    """Only the results of the samples of the dataset count, and the results are cleared."""
    evaluator = Evaluator(Mean())
    evaluator.process([1.0, 3.0, 100.0])
    assert evaluator.evaluate(2) == {"test/mean": 2.0}
    assert evaluator.metrics[0].results == []
    assert get_metric_value("mean", {"test/mean": 2.0}) == 2.0


def test_metrics_with_the_same_name_are_refused() -> None:
    """Two metrics with the same prefix and name are an error."""
    evaluator = Evaluator([Mean(), Mean()])
    with pytest.raises(ConfigValueError, match="test/mean"):
        evaluator.offline_evaluate([1.0])


def test_predictions_are_saved(tmp_path: Path) -> None:
    """DumpResults saves the predictions of the whole dataset in a pickle file."""
    path = tmp_path / "results.pkl"
    Evaluator(DumpResults(str(path))).offline_evaluate([{"score": 1}, {"score": 2}])
    assert pickle.loads(path.read_bytes()) == [{"score": 1}, {"score": 2}]
