"""With deterministic algorithms, a resumed run on a GPU continues with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.models import Classifier, Encoder
from tests.gpu.runs import checkpoint, in_new_process, trained

# The dropout layers draw from the generator of the GPU.
_WITH_DROPOUT = {
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 5),
    ),
    "transformer": lambda: nn.Sequential(Encoder(), nn.Dropout(0.2)),
}


def run_in_parts(folder: str, name: str, options: dict[str, Any]) -> None:
    """Train 12 iterations at once in ``whole``, and in two parts in ``parts``."""
    common = {
        "randomness": {"seed": 3, "deterministic": True},
        "default_hooks": {"checkpoint": {"by_epoch": False, "interval": 6, **options.pop("checkpoint", {})}},
        **options,
    }
    for kind, length, resume in (("whole", 12, False), ("parts", 6, False), ("parts", 12, True)):
        torch.manual_seed(7)
        model = Classifier(_WITH_DROPOUT[name]())
        trained(Path(folder, kind), name, model=model, iterations=length, resume=resume, **common)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the values of a tree by their paths."""
    if isinstance(tree, dict):
        return {key: value for name, part in tree.items() for key, value in leaves(part, f"{path}/{name}").items()}
    if isinstance(tree, list | tuple):
        return {key: value for index, part in enumerate(tree) for key, value in leaves(part, f"{path}/{index}").items()}
    return {path: tree}


def require_equal_checkpoints(one: Path, other: Path) -> None:
    """Compare the weights and the optimizer state of two checkpoints in every bit."""
    first, second = (
        leaves({key: checkpoint(path)[key] for key in ("state_dict", "optimizer")}) for path in (one, other)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim_wrapper": {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": {"type": "SGD", "lr": 0.1}}},
        {"checkpoint": {"async_save": True}},
    ],
    ids=["fp32", "bf16", "asynchronous"],
)
@pytest.mark.parametrize("name", _WITH_DROPOUT)
def test_a_resumed_run_has_the_same_bits(
    name: str, options: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    """Weights, optimizer state and random numbers (dropout) after the resumed part equal those of the whole run."""
    # In a new process, because torch reads CUBLAS_WORKSPACE_CONFIG before the first computation on the GPU.
    in_new_process(run_in_parts, str(tmp_path), name, dict(options))
    require_equal_checkpoints(tmp_path / "whole" / "iter_12", tmp_path / "parts" / "iter_12")
    del device
