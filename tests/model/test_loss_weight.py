"""An update averages over everything that the loss counts, in all micro-batches and on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.dist import get_rank
from stratagem.errors import ConfigTypeError, TrainingError
from stratagem.model import BaseModel, ModelWithLoss, SupervisedModel
from stratagem.optim import OptimWrapper
from stratagem.strategies import BaseStrategy, DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from stratagem.tensors.dtensor import full_tensor
from tests.support.ranks import Ranks, seed_generators

IGNORED = -100
CLASSES = 4
WORDS = 7


class Composite(nn.Module):
    """Cross entropy and a penalty on large predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.CrossEntropyLoss(ignore_index=2)

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.classes(predictions, targets)
        return loss


class CountsFrom1(nn.Module):
    """A loss with an attribute ``ignore_index``, as in segmentation libraries."""

    ignore_index = 0

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(predictions, targets, ignore_index=0)


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0])
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross entropy": nn.CrossEntropyLoss(),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "function": functional.cross_entropy,
    "partial function": functools.partial(functional.cross_entropy, weight=CLASS_WEIGHTS, ignore_index=3),
    "inside another module": Composite(),
    "attribute of a custom loss": CountsFrom1(),
}
TARGETS = torch.tensor([0, 1, IGNORED, 3, 2, 1, IGNORED, IGNORED])


def inputs() -> Tensor:
    """Return 8 samples with 3 features."""
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(4))


def targets_of(loss: Callable[..., Tensor]) -> Tensor:
    """Return targets; a target of -100 is only valid if the loss ignores it."""
    ignores = getattr(loss, "ignore_index", None) == IGNORED or loss is functional.cross_entropy
    return TARGETS if ignores else TARGETS.clamp(min=1)


def gradient_of_all(network: nn.Module, loss: Callable[..., Tensor], targets: Tensor) -> Tensor:
    """Return the gradient of the loss of all samples in one batch, with plain torch."""
    network.zero_grad()
    loss(network(inputs()), targets).backward()
    return network.weight.grad.clone()  # type: ignore[union-attr, operator]


def accumulated_gradient(model: BaseModel, weight: nn.Parameter, batches: list[Any]) -> Tensor:
    """Return the gradient of one update over micro-batches, which is the change of the weight with a learning rate of 1."""
    before = weight.detach().clone()
    model.zero_grad()
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=len(batches))
    for batch in batches:
        model.train_step(batch, optim)
    return before - weight.detach()


@pytest.mark.parametrize("name", LOSSES)
def test_accumulation_gives_the_mean_over_all_counted_targets(name: str) -> None:
    """Micro-batches of 3, 4 and 1 samples give the gradient of a batch of 8, although ignored targets are uneven."""
    loss = LOSSES[name]
    network, targets = nn.Linear(3, CLASSES), targets_of(loss)
    expected = gradient_of_all(network, loss, targets)
    batches = list(zip(inputs().split([3, 4, 1]), targets.split([3, 4, 1]), strict=True))
    found = accumulated_gradient(SupervisedModel(network, loss), network.weight, batches)
    torch.testing.assert_close(found, expected)


def test_class_probabilities_count_once_each() -> None:
    """Targets that are probabilities count equally, also with class weights."""
    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    network, targets = nn.Linear(3, CLASSES), torch.rand(8, CLASSES).softmax(1)
    expected = gradient_of_all(network, loss, targets)
    batches = list(zip(inputs().split([3, 5]), targets.split([3, 5]), strict=True))
    found = accumulated_gradient(SupervisedModel(network, loss), network.weight, batches)
    torch.testing.assert_close(found, expected)


def test_a_micro_batch_without_targets_changes_nothing() -> None:
    """A micro-batch whose targets are all ignored has a loss of NaN in torch, but here it contributes nothing."""
    network, loss = nn.Linear(3, CLASSES), nn.CrossEntropyLoss()
    targets = torch.tensor([0, 1, 2, 3, *[IGNORED] * 4])
    expected = gradient_of_all(network, loss, targets)
    batches = list(zip(inputs().split(4), targets.split(4), strict=True))
    found = accumulated_gradient(SupervisedModel(network, loss), network.weight, batches)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(reduction="sum"), functional.mse_loss])
def test_losses_that_count_everything_are_weighted_equally(loss: Any) -> None:
    """Mean squared errors and sums return no weight, so their updates are the same as before."""
    model = SupervisedModel(nn.Linear(3, 3), loss)
    assert list(model(inputs(), torch.zeros(8, 3), mode="loss")) == ["loss"]


def test_the_user_can_give_the_weight_of_a_batch() -> None:
    """With the number of samples as weight, micro-batches of 6 and 2 samples give the mean squared error of 8."""
    network, loss, targets = nn.Linear(3, CLASSES), nn.MSELoss(), torch.randn(8, CLASSES)
    expected = gradient_of_all(network, loss, targets)
    batches = list(zip(inputs().split([6, 2]), targets.split([6, 2]), strict=True))
    model = SupervisedModel(network, loss, weight=lambda _, targets: len(targets))
    torch.testing.assert_close(accumulated_gradient(model, network.weight, batches), expected)


def test_equal_weights_are_available() -> None:
    """``weight=False`` gives the mean of the micro-batch means."""
    network, loss = nn.Linear(3, CLASSES), nn.CrossEntropyLoss()
    parts = [gradient_of_all(network, loss, torch.where(torch.arange(8) < 3, TARGETS, IGNORED))]
    parts += [gradient_of_all(network, loss, torch.where(torch.arange(8) < 3, IGNORED, TARGETS))]
    batches = list(zip(inputs().split([3, 5]), TARGETS.split([3, 5]), strict=True))
    found = accumulated_gradient(SupervisedModel(network, loss, weight=False), network.weight, batches)
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize("make", [lambda: SupervisedModel(nn.Linear(1, 1), nn.MSELoss(), weight="n")])
def test_a_weight_of_the_wrong_type_is_refused(make: Callable[[], Any]) -> None:
    """A name raises an error in ``SupervisedModel``, because its batches have no named entries."""
    with pytest.raises(ConfigTypeError, match="weight must be a function of the predictions and targets"):
        make()
    with pytest.raises(ConfigTypeError, match="weight must be a name, a function"):
        ModelWithLoss(nn.Linear(1, 1), weight=3)  # type: ignore[arg-type]


# ---- networks that return their loss ------------------------------------------------------------------------------


class Words(nn.Module):
    """A network with the arguments and outputs of a transformers model; subclasses compute the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WORDS, WORDS)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(functional.one_hot(input_ids, WORDS).float())
        return {"loss": self.loss(logits, labels), "logits": logits}


class Causal(Words):
    """A language model that shifts the labels itself, under a name that does not show it."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class TinyForCausalLM(Causal):
    """A language model that is recognized by its name, with an auxiliary loss."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) + 0.3


class Masked(Words):
    """A masked language model, which predicts each label at its own position."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TinyForConditionalGeneration(Masked):
    """An encoder-decoder model, whose labels are aligned with its outputs although its name is that of a causal model."""

    config = SimpleNamespace(is_encoder_decoder=True)


def words() -> tuple[Tensor, Tensor]:
    """Return 6 sequences of 5 words, and labels of which different numbers count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(WORDS, (6, 5), generator=generator)
    labels = torch.where(torch.rand(6, 5, generator=generator) < torch.linspace(0.1, 0.9, 6)[:, None], ids, IGNORED)
    labels[:, 0] = ids[:, 0]
    labels[1, 1:] = IGNORED
    return ids, labels


@pytest.mark.parametrize("kind", [Causal, TinyForCausalLM, Masked, TinyForConditionalGeneration])
@pytest.mark.parametrize("positional", [False, True])
def test_a_language_model_averages_over_the_labels_that_count(kind: type[Words], *, positional: bool) -> None:
    """Micro-batches of 4, 1 and 1 sequences give the gradient of all 6; one of them has no label but the first."""
    network = kind()
    ids, labels = words()
    network(ids, labels)["loss"].backward()
    expected = network.layer.weight.grad.clone()  # type: ignore[union-attr]
    network.zero_grad()
    order = torch.tensor([0, 2, 3, 4, 1, 5])
    parts = list(zip(ids[order].split([4, 1, 1]), labels[order].split([4, 1, 1]), strict=True))
    batches = [part if positional else {"input_ids": part[0], "labels": part[1]} for part in parts]
    found = accumulated_gradient(ModelWithLoss(network), network.layer.weight, batches)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weight", ["count", "number", lambda batch, _: batch["labels"].ne(IGNORED).sum()])
def test_the_weight_can_be_an_entry_of_the_batch_or_a_function(weight: Any) -> None:
    """An entry of the batch is not passed to the network; an entry of the output works as well."""

    class Counting(Masked):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {**super().forward(input_ids, labels), "number": (labels != IGNORED).sum()}

    ids, labels = words()
    batch = {"input_ids": ids, "labels": labels}
    if weight == "count":
        batch["count"] = (labels != IGNORED).sum()
    outputs = ModelWithLoss(Counting(), weight=weight)(**batch, mode="loss")
    assert outputs["weight"] == (labels != IGNORED).sum()


def test_a_missing_weight_is_an_error() -> None:
    """The error lists the entries of the batch."""
    ids, labels = words()
    with pytest.raises(TrainingError, match="weight='tokens': neither .* The batch has 'input_ids', 'labels'"):
        ModelWithLoss(Masked(), weight="tokens")(input_ids=ids, labels=labels, mode="loss")


def test_a_loss_that_is_not_an_average_over_labels_is_weighted_equally() -> None:
    """A CTC model divides by target lengths, so the number of labels is not its weight."""

    class TinyForCTC(Masked):
        pass

    ids, labels = words()
    assert list(ModelWithLoss(TinyForCTC())(input_ids=ids, labels=labels, mode="loss")) == ["loss"]


# ---- ranks --------------------------------------------------------------------------------------------------------


def one_update(kind: str, folder: str) -> Tensor:
    """Return the change of the weights in one update of two micro-batches per rank."""
    strategy: BaseStrategy = {"ddp": DDPStrategy, "fsdp": FSDPStrategy}[kind](
        work_dir=folder, log_kwargs={"log_level": "ERROR"}, env_kwargs={"launcher": "pytorch"}
    )
    seed_generators(2)
    optim = {"optimizer": {"type": "SGD", "lr": 1.0}, "accumulative_counts": 2}
    model, wrapper = strategy.prepare(ModelWithLoss(Causal()), optim_wrapper=optim, dispatch_kwargs={"max_iters": 100})
    before = _full(strategy)
    ids, labels = words()
    sizes = [1, 2, 2, 1]
    parts = list(zip(ids.split(sizes), labels.split(sizes), strict=True))[2 * get_rank() : 2 * get_rank() + 2]
    for part in parts:
        model.train_step({"input_ids": part[0], "labels": part[1]}, wrapper)
    change = before - _full(strategy)
    strategy.close()
    return change


def _full(strategy: BaseStrategy) -> Tensor:
    parameters = dict(strategy.unwrap_model().named_parameters())
    return full_tensor(parameters["network.layer.weight"].detach()).clone()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_with_different_numbers_of_labels_average_over_all(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """Two ranks with two micro-batches each compute the gradient of plain torch with one batch."""
    found = ranks.run(one_update, kind, str(tmp_path))
    seed_generators(2)
    network = Causal()
    ids, labels = words()
    network(ids, labels)["loss"].backward()
    for change in found:
        torch.testing.assert_close(change, network.layer.weight.grad)


@pytest.mark.parametrize("accumulative_counts", [1, 2])
def test_the_weight_is_not_computed_if_it_has_no_effect(tmp_path: Path, accumulative_counts: int) -> None:
    """In a single process, only gradient accumulation needs weights."""
    strategy = SingleDeviceStrategy(work_dir=str(tmp_path), log_kwargs={"log_level": "ERROR"})
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": accumulative_counts}
    strategy.prepare(
        SupervisedModel(nn.Linear(3, CLASSES), nn.CrossEntropyLoss()),
        optim_wrapper=optim,
        dispatch_kwargs={"max_iters": 4},
    )
    outputs = strategy.model(inputs(), TARGETS, mode="loss")
    strategy.close()
    assert ("weight" in outputs) == (accumulative_counts > 1)
