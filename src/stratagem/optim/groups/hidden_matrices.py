"""Find the weight matrices of the hidden layers of a model, which matrix optimizers such as Muon update."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from torch import nn

from stratagem.utils import canonical_names

__all__ = ["find_hidden_matrices"]

_HEAD_WORDS: Final = frozenset({"head", "heads", "classifier", "classifiers", "logits", "score", "unembed"})
_HEAD_NAMES: Final = frozenset({"fc", "output_layer", "output_projection", "qa_outputs"})
_ATTENTION: Final = frozenset({"attention", "attn", "attend"})
_PROJECTIONS: Final = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})

_Path = tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class _Matrix:
    """A parameter with two dimensions, under one of its names."""

    path: _Path
    key: str
    module: nn.Module
    parameter: nn.Parameter

    @property
    def name(self) -> str:
        return ".".join((*self.path, self.key))

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer or a projection of ``nn.MultiheadAttention``."""
        if isinstance(self.module, nn.MultiheadAttention):
            return self.key in _PROJECTIONS
        return self.key == "weight" and _is_linear(self.module)

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, nn.Embedding | nn.EmbeddingBag)


def find_hidden_matrices(model: nn.Module) -> tuple[set[int], dict[str, str]]:
    """Return the ids of the hidden matrices, and the reason why each other parameter with two dimensions is not one.

    A hidden matrix is the weight of a linear layer (``nn.Linear`` and its subclasses, the projections of
    ``nn.MultiheadAttention``, and ``weight`` of classes with ``Linear`` or ``Conv1D`` in their name) with at least two rows and
    columns, unless it

    - is tied to an embedding,
    - belongs to an output layer: the last linear layer of the model, or a linear layer whose name is that of a head, such as
      ``lm_head``, ``classifier`` or ``fc``, or the last one of a module with such a name,
    - belongs to a module with ``embed`` in its name.

    The last two rules do not apply to layers that are repeated, such as those of the blocks of a transformer: in another module
    of the same class next to it, a layer of the same name has a weight of the same shape.

    Returns:
        The ids, and a mapping from names to reasons.
    """
    modules = _modules(model)
    matrices = list(_matrices(modules))
    linears = [each for each in matrices if each.is_linear]
    repeated = _repeated(modules, linears)
    outputs = {id(each.parameter) for each in _output_layers(modules, linears, repeated)}
    embeddings = {id(each.parameter) for each in matrices if each.is_embedding}
    reasons = {
        each.name: (each, _reason(each, outputs, embeddings, is_repeated=each.path in repeated)) for each in matrices
    }
    excluded = {name: reason for name, (_, reason) in reasons.items() if reason}
    # A shared matrix is hidden only if it is under each of its names.
    ids = {id(each.parameter) for each, reason in reasons.values() if reason}
    return {id(each.parameter) for each in matrices} - ids, excluded


def _reason(matrix: _Matrix, outputs: set[int], embeddings: set[int], *, is_repeated: bool) -> str:
    if id(matrix.parameter) in embeddings:
        return "embedding" if matrix.is_embedding else "tied to an embedding"
    if not matrix.is_linear:
        return "not the weight of a linear layer"
    if id(matrix.parameter) in outputs:
        return "output layer"
    if not is_repeated and any("embed" in component.lower() for component in matrix.path):
        return "embedding by name"
    return "a single row or column" if min(matrix.parameter.shape) < 2 else ""


def _modules(model: nn.Module) -> dict[_Path, nn.Module]:
    """Return the modules, in order of registration, by their paths without wrappers, under each of their names."""
    canonical = canonical_names(model)
    named = ((canonical(name), module) for name, module in model.named_modules(remove_duplicate=False))
    # A wrapper has the same path as the module in it, which comes later and replaces it.
    return {tuple(name.split(".")) if name else (): module for name, module in named}


def _matrices(modules: Mapping[_Path, nn.Module]) -> Iterator[_Matrix]:
    for path, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 2:
                yield _Matrix(path, key, module, parameter)


def _is_linear(module: nn.Module) -> bool:
    # FSDP replaces the class of a module by a subclass.
    names = (base.__name__ for base in type(module).__mro__)
    return isinstance(module, nn.Linear) or any("Linear" in name or name.endswith("Conv1D") for name in names)


def _repeated(modules: Mapping[_Path, nn.Module], linears: Sequence[_Matrix]) -> set[_Path]:
    """Return the paths of the linear layers that modules of the same class next to each other have in common."""
    keys: dict[_Path, set[object]] = {each.path: set() for each in linears}
    for each in linears:
        for at in range(1, len(each.path)):
            if _is_head_name(each.path[at - 1]):
                break  # Several modules in a head are several heads.
            above, below = each.path[: at - 1], each.path[at:]
            keys[each.path].add((above, type(modules[each.path[:at]]), below, each.key, each.parameter.shape))
    counts = Counter(key for some in keys.values() for key in some)
    return {path for path, some in keys.items() if any(counts[key] > 1 for key in some)}


def _output_layers(
    modules: Mapping[_Path, nn.Module], linears: Sequence[_Matrix], repeated: set[_Path]
) -> Iterator[_Matrix]:
    heads: dict[_Path, _Matrix] = {}
    for each in linears:
        if each.path in repeated:
            continue
        for at in range(1, len(each.path) + 1):
            if _is_head_name(each.path[at - 1]):
                is_several = isinstance(modules[each.path[:at]], nn.ModuleList | nn.ModuleDict)
                heads[each.path[: at + is_several]] = each  # The last linear layer of a head replaces the others.
    yield from heads.values()
    if linears and linears[-1].path not in repeated:
        yield linears[-1]


def _is_head_name(component: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", component).lower().split("_")
    named = not _HEAD_WORDS.isdisjoint(words) and _ATTENTION.isdisjoint(words)
    return named or component.lower() in _HEAD_NAMES
