"""Moving batches to the model's device. The meta device is used in place of an accelerator."""

from __future__ import annotations

from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from stratagem.config import ConfigDict
from stratagem.errors import ConfigTypeError
from stratagem.model import BaseDataPreprocessor, pin_tensors, to_device

META = torch.device("meta")


class Pair(NamedTuple):
    """A batch with named fields."""

    image: Any
    label: Any


class Boxes:
    """A user-defined object with a ``to`` method."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device) -> Boxes:
        """Return a copy on ``device``."""
        return Boxes(str(device))


def test_every_tensor_is_moved_and_the_structure_is_kept() -> None:
    """Tensors in mappings, lists, tuples, named tuples and objects with ``to`` are moved; other values are kept."""
    data = {
        "list": [torch.ones(1), "text"],
        "tuple": (torch.ones(1), 3),
        "pair": Pair(torch.ones(1), None),
        "ordered": OrderedDict(x=torch.ones(1)),
        "boxes": Boxes(),
    }
    moved = to_device(data, META)
    tensors = (moved["list"][0], moved["tuple"][0], moved["pair"].image, moved["ordered"]["x"])
    assert all(tensor.device == META for tensor in tensors)
    assert moved["boxes"].device == META
    assert (moved["list"][1], moved["tuple"][1], moved["pair"].label) == ("text", 3, None)
    assert [type(part) for part in moved.values()] == [list, tuple, Pair, OrderedDict, Boxes]
    assert data["list"][0].device.type == "cpu", "the batch must not be modified"


def test_a_tensor_on_the_device_is_not_copied() -> None:
    """A tensor that is already on the device is not copied."""
    tensor = torch.ones(1)
    assert to_device(tensor, torch.device("cpu")) is tensor


@dataclass(frozen=True)
class Labeled:
    """A batch with a field that its constructor does not accept."""

    image: Any
    name: str = "x"
    size: int = field(init=False, default=3)


class Bag(MutableMapping[str, Any]):
    """A mapping whose constructor has other arguments."""

    def __init__(self, size: int, *, unit: str) -> None:
        self.size, self.unit, self._items = size, unit, dict[str, Any]()

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Images(Sequence[Any]):
    """An immutable sequence."""

    def __init__(self, images: list[Any]) -> None:
        self.images = images

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)


class Tagged(list[Any]):
    """A list with an attribute."""

    tag = "none"


class MovedInPlace:
    """An object whose ``to`` returns None."""

    def __init__(self) -> None:
        self.tensor = torch.ones(1)

    def to(self, device: torch.device) -> None:
        """Move the object in place."""
        self.tensor = self.tensor.to(device)


def bag() -> Bag:
    """Return a mapping that holds a tensor and a list of tensors."""
    result = Bag(2, unit="px")
    result.update(one=torch.ones(1), two=[torch.ones(1)])
    return result


def tagged() -> Tagged:
    """Return a list with a tensor and an attribute."""
    result = Tagged([torch.ones(1)])
    result.tag = "train"
    return result


CONTAINERS = {
    "defaultdict": lambda: defaultdict(list, x=torch.ones(1)),
    "Counter": lambda: Counter({"x": torch.ones(1)}),
    "UserDict": lambda: UserDict(x=torch.ones(1)),
    "mapping with another constructor": bag,
    "mapping proxy": lambda: MappingProxyType({"x": torch.ones(1)}),
    "ConfigDict": lambda: ConfigDict(x=torch.ones(1), y=dict(z=[torch.ones(1)])),
    "UserList": lambda: UserList([torch.ones(1)]),
    "list with an attribute": tagged,
    "immutable sequence": lambda: Images([torch.ones(1)]),
    "deque": lambda: deque([torch.ones(1)], maxlen=4),
    "set": lambda: {torch.ones(1)},
    "frozenset": lambda: frozenset([torch.ones(1)]),
    "nested tuple": lambda: ((torch.ones(1), [torch.ones(1)]), "text"),
    "max of torch": lambda: torch.ones(2, 2).max(0),
    "dataclass": lambda: Labeled(torch.ones(1)),
    "packed sequence": lambda: pack_sequence([torch.ones(3, 1), torch.ones(2, 1)]),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "moved in place": MovedInPlace,
}


def tensors_of(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield all tensors that can be reached from ``value``."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = list(value.values()) if isinstance(value, Mapping) else []
    parts += list(value) if isinstance(value, list | tuple | set | frozenset | deque | UserList | Images) else []
    for part in [*parts, *getattr(value, "__dict__", {}).values()]:
        yield from tensors_of(part, seen)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("nested", [False, True])
def test_every_container_of_a_batch_is_moved(name: str, *, nested: bool) -> None:
    """All tensors of a container are on the device, in a container of the same type; the batch itself is not changed."""
    batch = CONTAINERS[name]()
    attributes = {key: value for key, value in getattr(batch, "__dict__", {}).items() if isinstance(value, int | str)}
    moved = to_device({"inner": [batch]}, META)["inner"][0] if nested else to_device(batch, META)
    found = list(tensors_of(moved, set()))
    devices = {tensor.device.type for tensor in found}
    if name == "packed sequence":
        assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
    else:
        assert found
        assert devices == {"meta"}
    assert isinstance(moved, type(batch)) or (type(batch), type(moved)) == (MappingProxyType, dict)
    assert {key: getattr(moved, key) for key in attributes} == attributes
    if name != "moved in place":
        assert {tensor.device.type for tensor in tensors_of(batch, set())} == {"cpu"}


@pytest.mark.parametrize(
    "value", ["text", b"bytes", range(3), np.ones(3), None, 1.5, [1, "x"], {"a": (1, 2)}, torch.Size([2])]
)
def test_a_value_without_tensors_is_returned_unchanged(value: Any) -> None:
    """A value without tensors is the same object afterwards."""
    assert to_device(value, META) is value


def test_an_empty_bounded_deque_keeps_its_length() -> None:
    """A bounded deque keeps its maximum length."""
    moved = to_device(deque([torch.ones(1)], maxlen=4), META)
    assert moved.maxlen == 4


def test_a_container_that_cannot_be_created_is_named() -> None:
    """The error names the class of a sequence that cannot be created from its values, and suggests a solution."""

    class Fixed(Images):
        def __init__(self, one: Any, two: Any) -> None:
            super().__init__([one, two])

    with pytest.raises(ConfigTypeError, match=r"Fixed, which cannot be moved .* method to\(device\)"):
        to_device(Fixed(torch.ones(1), 2), META)


def test_non_blocking_is_passed_to_objects_that_accept_it() -> None:
    """An object whose ``to`` accepts ``non_blocking`` receives it; others are called without it."""
    calls: list[Any] = []

    class Graph:
        def to(self, device: torch.device, *, non_blocking: bool = False) -> Graph:
            calls.append((device, non_blocking))
            return self

    to_device([Graph(), Boxes()], META, non_blocking=True)
    assert calls == [(META, True)]


class Model(nn.Module):
    """A model with a nested preprocessor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 1), BaseDataPreprocessor())

    @property
    def preprocessor(self) -> BaseDataPreprocessor:
        """The nested preprocessor."""
        return self.inner[1]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("meta"),
        lambda model: model.to(META, torch.float64),
        lambda model: model.to_empty(device="meta"),
    ],
)
def test_the_preprocessor_follows_the_model(move: Any) -> None:
    """However the model is moved, its batches are moved to the same device."""
    model = Model()
    move(model)
    assert model.preprocessor.device == META
    assert model.preprocessor((torch.ones(1), 5))[0].device == META


def test_the_preprocessor_returns_to_the_cpu() -> None:
    """The preprocessor follows the model back to the CPU."""
    model = Model().to("meta").to_empty(device="cpu")
    assert model.preprocessor.device == torch.device("cpu")


def test_changing_the_precision_does_not_move_batches() -> None:
    """Changing the precision of a model changes neither the device nor the precision of its batches."""
    model = Model().half()
    assert model.preprocessor.device == torch.device("cpu")
    assert model.preprocessor(torch.ones(1)).dtype == torch.float32


def test_a_batch_on_the_cpu_is_returned_unchanged() -> None:
    """On the CPU, the batch is returned as it is, without visiting its elements."""
    batch = {"x": [torch.ones(1)]}
    assert BaseDataPreprocessor()(batch, True) is batch


def test_a_model_built_on_the_meta_device_can_be_materialized() -> None:
    """The preprocessor works after a model on the meta device is materialized."""
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    assert model.preprocessor(torch.ones(1)).device.type == "cpu"


def test_hooks_of_the_preprocessor_are_called_on_the_cpu() -> None:
    """Forward hooks of the preprocessor are called even if no data is moved."""
    preprocessor = BaseDataPreprocessor()
    preprocessor.register_forward_hook(lambda module, arguments, output: output + 1)
    assert preprocessor(torch.ones(1), True).item() == 2.0


def test_a_custom_preprocessor_is_called_on_the_cpu() -> None:
    """A user-defined preprocessor is called on the CPU."""

    class Doubled(BaseDataPreprocessor):
        def forward(self, data: Any, training: bool = False) -> Any:
            return 2 * super().forward(data, training)

    assert Doubled()(torch.ones(1), True).item() == 2.0


class PinnedMemory(TorchDispatchMode):
    """Pins tensors as torch does with an accelerator, by copying them, and counts these and other copies.

    Attributes:
        pinned: the number of tensors that were pinned.
        copies: for each tensor that was copied to another device, whether the copy may run asynchronously.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned = 0
        self.copies: list[bool] = []
        self._tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.is_pinned.default:
            return any(args[0] is tensor for tensor in self._tensors)
        if func is torch.ops.aten._pin_memory.default:
            self.pinned += 1
            self._tensors.append(args[0].clone())
            return self._tensors[-1]
        if func is torch.ops.aten._to_copy.default:
            self.copies.append(kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@dataclass
class Scene:
    """A batch that torch's DataLoader does not pin."""

    image: Tensor
    boxes: Any


def test_only_tensors_in_pinned_memory_are_copied_asynchronously() -> None:
    """By default, a preprocessor copies tensors from pinned memory without waiting, and others with waiting."""
    preprocessor = BaseDataPreprocessor()
    preprocessor.to(META)
    with PinnedMemory() as memory:
        pinned, pageable = torch.ones(2).pin_memory(), torch.ones(2)
        moved = preprocessor({"first": pinned, "second": [pageable, pinned]})
    assert memory.copies == [True, False, True]
    assert moved["second"][0].device == META


@pytest.mark.parametrize("value", [True, False])
def test_a_configured_non_blocking_is_kept(value: bool) -> None:
    """The option of a preprocessor applies to all tensors."""
    preprocessor = BaseDataPreprocessor(non_blocking=value)
    preprocessor.to(META)
    with PinnedMemory() as memory:
        preprocessor([torch.ones(2).pin_memory(), torch.ones(2)])
    assert memory.copies == [value, value]


def test_a_batch_on_the_device_is_not_copied_again() -> None:
    """If a batch was copied ahead, the preprocessor returns the same object without a copy."""
    preprocessor = BaseDataPreprocessor()
    preprocessor.to(META)
    with PinnedMemory() as memory:
        batch = to_device({"pair": (torch.ones(2), Scene(torch.ones(2), {"a": torch.ones(2)}))}, META)
        assert len(memory.copies) == 3
        assert preprocessor(batch, training=True) is batch
    assert len(memory.copies) == 3


def test_every_tensor_is_pinned_once_in_any_container() -> None:
    """Dataclasses, sets and deques are pinned as well; what is pinned or on the device is kept."""
    with PinnedMemory() as memory:
        ready, there = torch.ones(1).pin_memory(), torch.ones(1, device=META)
        batch = {
            "scene": Scene(torch.ones(2), [torch.ones(3), "text"]),
            "queue": deque([torch.ones(1)]),
            "set": frozenset({torch.ones(1)}),
            "packed": pack_sequence([torch.ones(2, 1)]),
            "ready": [ready, there],
        }
        pinned = pin_tensors(batch)
        again = pin_tensors(pinned)
    assert isinstance(pinned["scene"], Scene)
    assert pinned["scene"].boxes[1] == "text"
    assert pinned["ready"] is batch["ready"]
    assert again is pinned
    # One before, two in the dataclass, and one each in the queue, the set and the packed sequence, whose sizes stay on the host.
    assert memory.pinned == 1 + 2 + 1 + 1 + 1


@pytest.mark.parametrize(("pinned", "expected"), [(True, True), (False, False)])
def test_an_object_is_copied_asynchronously_if_it_is_pinned(pinned: bool, expected: bool) -> None:
    """By default, an object whose ``to`` accepts ``non_blocking`` receives it if its ``is_pinned`` returns True."""
    calls = []

    class Graph:
        def is_pinned(self) -> bool:
            return pinned

        def to(self, device: torch.device, *, non_blocking: bool = False) -> Graph:
            calls.append(non_blocking)
            return self

    to_device([Graph()], META, non_blocking=None)
    assert calls == [expected]
