"""The weight of a micro-batch: the number of targets, or the sum of their class weights, that its loss averages over."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AveragingLoss", "LabelCount", "averaging_loss", "weight_of_targets", "zero_without_targets"]

# The default ignore_index in torch and in the transformers library.
_IGNORE_INDEX: Final = -100
_FUNCTIONS: Final = (functional.cross_entropy, functional.nll_loss)
# The losses of these models are not averages over the labels.
_OTHER_AVERAGES: Final = ("CTC", "RNNT", "TDT", "Detection", "ForSegmentation", "QuestionAnswering", "TTS")
_ALIGNED: Final = ("MaskedLM", "Classification", "SemanticSegmentation", "MultipleChoice", "PreTraining")


class AveragingLoss(Protocol):
    """The settings of a loss that averages over targets; modules such as ``CrossEntropyLoss`` have these attributes."""

    @property
    def ignore_index(self) -> int:
        """Targets with this value do not count."""

    @property
    def weight(self) -> Tensor | None:
        """The weight of each class; None if every class has weight 1."""


@final
@dataclass(frozen=True, slots=True)
class _Settings:
    ignore_index: int = _IGNORE_INDEX
    weight: Tensor | None = None


def averaging_loss(loss: Any) -> AveragingLoss | None:
    """Return the settings of a loss that averages over the targets that are not ignored; None for any other loss.

    The recognized losses are cross entropy and negative log likelihood as modules or functions, modules that contain
    exactly one such module, and modules with an ``ignore_index``.
    """
    if isinstance(loss, functools.partial) and loss.func in _FUNCTIONS:
        return _settings_of_call(loss)
    if loss in _FUNCTIONS:
        return _Settings()
    if not isinstance(loss, nn.Module):
        return None
    inner = [each for each in loss.modules() if isinstance(each, nn.CrossEntropyLoss | nn.NLLLoss)]
    if inner:
        return inner[0] if len(inner) == 1 and inner[0].reduction == "mean" else None
    ignored = getattr(loss, "ignore_index", None)
    is_mean = getattr(loss, "reduction", "mean") == "mean"
    return _Settings(ignored) if isinstance(ignored, int) and not isinstance(ignored, bool) and is_mean else None


def _settings_of_call(loss: functools.partial[Any]) -> AveragingLoss | None:
    options = loss.keywords
    if options.get("reduction", "mean") != "mean" or loss.args:
        return None
    return _Settings(options.get("ignore_index", _IGNORE_INDEX), options.get("weight"))


def weight_of_targets(loss: AveragingLoss, predictions: Any, targets: Any) -> Tensor | float | None:
    """Return what the loss divides by: the number of targets that are not ignored, or the sum of their class weights.

    Returns None if the targets are not a tensor.
    """
    if not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point():
        # The targets are class probabilities. The loss divides by their number, regardless of class weights.
        classes = predictions.shape[min(1, predictions.ndim - 1)] if isinstance(predictions, Tensor) else 1
        return targets.numel() // classes
    if loss.weight is None:
        return _count(targets, loss.ignore_index)
    counts = targets != loss.ignore_index
    return (loss.weight[torch.where(counts, targets, 0)] * counts).sum()


def _count(targets: Tensor, ignore_index: int) -> Tensor | int:
    """Return the number of targets that are not ignored, as a tensor where reading it would synchronize with the device."""
    count = (targets != ignore_index).sum()
    return count if targets.device.type != "cpu" or torch.compiler.is_compiling() else int(count)


def zero_without_targets(loss: Tensor, weight: Tensor | float) -> Tensor:
    """Return the loss, or 0 if its weight is 0, because the mean over no targets is NaN."""
    if not isinstance(weight, Tensor):
        if weight:
            return loss
        weight = torch.zeros((), device=loss.device)
    return torch.where(weight == 0, torch.zeros_like(loss), loss)


@final
class LabelCount:
    """Counts the labels that the loss of a network averages over.

    Labels of -100 are ignored, as in transformers. A causal language model predicts each label from the preceding tokens,
    so the first label does not count. For a transformers model, the class determines whether the first label counts; for
    other networks, the loss of the first batch is compared with the cross entropy of its logits.

    Args:
        network: a network whose output contains the loss.
        key: the name of the argument that contains the labels.
    """

    def __init__(self, network: nn.Module, key: str) -> None:
        kind = f"{getattr(network, 'loss_type', None)} {_class_name(network)}"
        self._key = key
        self._is_average = not any(each in kind for each in _OTHER_AVERAGES)
        self._ignore_index = _IGNORE_INDEX
        config = getattr(network, "config", None)
        if "SemanticSegmentation" in kind:
            self._ignore_index = getattr(config, "semantic_loss_ignore_index", _IGNORE_INDEX)
        self._skips_first = _skips_first(kind, config)

    def __call__(self, batch: Mapping[str, Any], loss: Tensor, logits: Any) -> Tensor | float | None:
        """Return the number of labels of a batch that its loss averages over; None if that is unknown.

        Args:
            batch: the arguments of the network.
            loss: the loss.
            logits: the predictions; used only if the class of the network does not determine whether the first label counts.
        """
        labels = batch.get("shift_labels", batch.get(self._key))
        if not self._is_average or not isinstance(labels, Tensor):
            return None
        if labels.is_floating_point() or labels.dtype == torch.bool:
            return labels.numel()
        if labels.ndim > 1 and "shift_labels" not in batch:
            if self._skips_first is None:
                self._skips_first = _compare(loss, logits, labels, self._ignore_index)
            if self._skips_first:
                labels = labels[..., 1:]
        return _count(labels, self._ignore_index)


def _class_name(network: nn.Module) -> str:
    # An adapter, such as a PEFT model, wraps the network.
    base = getattr(network, "get_base_model", None)
    return type(base() if callable(base) else network).__name__


def _skips_first(kind: str, config: Any) -> bool | None:
    """Return whether the loss skips the first label; None if the class of the network does not determine that."""
    if getattr(config, "is_encoder_decoder", False) or any(each in kind for each in _ALIGNED):
        return False
    return True if "CausalLM" in kind or "ConditionalGeneration" in kind else None


@torch.no_grad()
def _compare(loss: Tensor, logits: Any, labels: Tensor, ignore_index: int) -> bool | None:
    """Return whether the loss is the cross entropy without the first label; None if this batch does not tell.

    Computes one sample at a time, because the logits of a language model are large. Synchronizes with the device.
    """
    if type(logits) is not Tensor or logits.shape[:-1] != labels.shape or loss.numel() != 1:
        return None
    value = float(loss.detach())
    aligned = _mean_cross_entropy(logits, labels, ignore_index)
    shifted = _mean_cross_entropy(logits[..., :-1, :], labels[..., 1:], ignore_index)
    if aligned is None or shifted is None or aligned == shifted:
        return None
    return abs(value - shifted) < abs(value - aligned)


def _mean_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> float | None:
    total, count = 0.0, int((labels != ignore_index).sum())
    for row, target in zip(logits, labels, strict=True):
        flat = row.float().reshape(-1, row.shape[-1])
        total += float(functional.cross_entropy(flat, target.reshape(-1), ignore_index=ignore_index, reduction="sum"))
    return total / count if count else None
