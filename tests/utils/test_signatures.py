import functools

import pytest

from stratagem.utils.signatures import arguments_of


class Base:
    def __init__(self, a, b=1):
        self.a = a


class Handing(Base):
    def __init__(self, c, **kwargs):
        self.d = kwargs.pop("d", None)
        super().__init__(**kwargs)


class Written(Base):
    def __init__(self, **kwargs):
        super().__init__(1, **kwargs)


class Named(Base):
    def __init__(self, **kwargs):
        Base.__init__(self, a=2, **kwargs)


class Keeping(Base):
    def __init__(self, **kwargs):
        self.kwargs = kwargs
        super().__init__(1)


class Refusing(Base):
    def __init__(self, a, **kwargs):
        if "x" in kwargs:
            self.x = kwargs["x"]
        if kwargs:
            raise TypeError(f"{sorted(kwargs)}")


class Bottom:
    def __init__(self, e=1, **kwargs):
        super().__init__(**kwargs)


class Inheriting(Handing):
    pass


class Choosing:
    def __new__(cls, kind, **kwargs):
        return Base(**kwargs) if kind else Handing(**kwargs)


def function(q, *rest, **kwargs):
    return Base(**kwargs)


def unknown(q, **kwargs):
    return kwargs


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (Base, {"a", "b"}),
        (Handing, {"a", "b", "c", "d"}),
        (Inheriting, {"a", "b", "c", "d"}),
        (Written, {"b"}),
        (Named, {"b"}),
        (Refusing, {"a", "x"}),
        (Bottom, {"e"}),
        (Choosing, {"kind", "a", "b", "c", "d"}),
        (function, {"q", "a", "b"}),
        (functools.partial(function, 1), {"a", "b"}),
        (functools.partial(Handing, c=1), {"a", "b", "c", "d"}),
    ],
)
def test_keyword_arguments_are_resolved_through_calls(target, names):
    """``**kwargs`` are resolved to the parameters of the callee, without those that are already passed."""
    taken = arguments_of(target)
    assert set(taken.names) == names
    assert not taken.open
    assert not taken.accepts("anything")


@pytest.mark.parametrize("target", [Keeping, unknown, dict])
def test_unresolvable_targets_accept_any_argument(target):
    """If kwargs are stored or the source is not Python, every argument is accepted."""
    assert arguments_of(target).accepts("anything")


def test_required_arguments_are_those_of_the_target():
    """Only the parameters of the target itself are required, because it may pass those of its parent."""
    assert arguments_of(Handing).required == {"c"}
    assert arguments_of(functools.partial(Base, a=1)).required == set()


def test_layers_and_metrics_are_resolved():
    """Layers that forward their arguments and metrics that dispatch reject unknown arguments."""
    import torch
    import torchmetrics

    assert not arguments_of(torch.nn.LSTM).accepts("mode")
    assert arguments_of(torch.nn.LSTM).accepts("hidden_size")
    accuracy = arguments_of(torchmetrics.Accuracy)
    assert accuracy.accepts("num_classes")
    assert accuracy.accepts("sync_on_compute")
    assert not accuracy.accepts("num_clases")
