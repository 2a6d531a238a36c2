import sys

import pytest

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.registry import (
    DATA_SAMPLERS,
    EVALUATOR,
    EVALUATORS,
    FUNCTIONS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    STRATEGIES,
    Registry,
    switch_scope,
)
from stratagem.registry.import_policy import TargetImportError


@pytest.fixture
def root():
    """A registry without a parent."""
    return Registry("animal", scope="zoo")


def test_a_class_is_registered_under_one_or_more_names(root):
    """A class can be registered under its name, another name or several names."""

    @root.register_module()
    class Cat:
        pass

    @root.register_module(name=["Hound", "Dog"])
    class Dog:
        pass

    root.register_module("Tom", module=Cat)
    assert root.get("Cat") is root.get("Tom") is Cat
    assert root.get("Hound") is root.get("Dog") is Dog
    assert len(root) == 4
    assert "Cat" in root
    assert "Cow" not in root
    assert root.get("Cow") is None


def test_a_duplicate_name_is_rejected_unless_forced(root):
    """Registering a name twice raises an error that shows the existing entry; ``force`` replaces it."""
    root.register_module("Cat", module=int)
    with pytest.raises(KeyError, match=r"'Cat' is already in the animal registry: <class 'int'>"):
        root.register_module("Cat", module=float)
    root.register_module("Cat", module=float, force=True)
    assert root.get("Cat") is float


@pytest.mark.parametrize("arguments", [{"name": 3}, {"force": 1}, {"module": 3}, {"name": [1]}])
def test_invalid_registrations_are_type_errors(root, arguments):
    """A name that is not a string, a ``force`` that is not a bool and an entry that is not callable raise errors."""
    with pytest.raises(TypeError):
        root.register_module(**arguments)


def test_a_name_must_be_a_string(root):
    """Looking up anything but a string raises a TypeError."""
    with pytest.raises(ConfigTypeError, match="must be a string, got 3"):
        root.get(3)


def test_a_child_falls_back_to_its_parent(root):
    """A child registry resolves its own names first, then those of its parent."""
    child = Registry("animal", parent=root, scope="aquarium")
    root.register_module("Cat", module=int)
    root.register_module("Fish", module=int)
    child.register_module("Fish", module=float)
    assert child.get("Cat") is int
    assert child.get("Fish") is float
    assert child.get("zoo.Fish") is int
    assert root.get("aquarium.Fish") is float
    assert root.get("aquarium.Cat") is None
    assert (child.parent, child.root, root.children) == (root, root, {"aquarium": child})


def test_an_empty_parent_passes_on_its_build_function(root):
    """A parent without entries passes its build function on to its children."""
    parent = Registry("animal", scope="a", build_func=lambda cfg, registry: (cfg, registry.scope))
    assert Registry("animal", parent=parent, scope="b").build("x") == ("x", "b")


def test_scopes_are_unique_among_the_children_of_a_parent(root):
    """A parent cannot have two children with the same scope."""
    Registry("animal", parent=root, scope="aquarium")
    with pytest.raises(ConfigValueError, match="already has a child with the scope 'aquarium'"):
        Registry("animal", parent=root, scope="aquarium")


def test_the_default_scope_is_the_package_of_the_caller():
    """The default scope of a registry is the package that creates it."""
    assert Registry("animal").scope == __name__.partition(".")[0]


def test_switching_the_scope_changes_the_lookup_order(root):
    """Within a scope, names are looked up in its registry first; the previous scope is restored afterwards."""
    child = Registry("animal", parent=root, scope="aquarium")
    with switch_scope("aquarium"), root.switch_scope_and_registry(None) as registry:
        assert registry is child
    with root.switch_scope_and_registry("aquarium") as registry:
        assert registry is child
    with root.switch_scope_and_registry(None) as registry:
        assert registry is root
    unknown = pytest.raises(ConfigKeyError, match=r"No animal registry has the scope 'aqarium'.*'aquarium'")
    with unknown, root.switch_scope_and_registry("aqarium"):
        pass


def test_looking_up_a_scope_imports_the_registries_of_that_library(root, tmp_path, monkeypatch):
    """``library.Name`` imports ``library.registry``, which creates the child registry."""
    (tmp_path / "scopelib").mkdir()
    (tmp_path / "scopelib" / "__init__.py").write_text("")
    (tmp_path / "scopelib" / "registry.py").write_text(
        "import sys\nfrom stratagem.registry import Registry\n"
        "ANIMALS = Registry('animal', parent=sys.animals, scope='scopelib', locations=['scopelib.cats'])\n"
    )
    (tmp_path / "scopelib" / "cats.py").write_text(
        "from scopelib.registry import ANIMALS\n@ANIMALS.register_module()\nclass Lion: pass\n"
    )
    monkeypatch.setattr(sys, "animals", root, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert root.get("scopelib.Lion").__name__ == "Lion"
    assert root.get("Lion") is None


def test_locations_are_imported_on_the_first_miss(tmp_path, monkeypatch):
    """The modules in ``locations`` are imported when a name is not found for the first time, not earlier."""
    (tmp_path / "located_animals.py").write_text("import sys\nsys.located.register_module('Cow', module=int)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("animal", scope="located", locations=["located_animals"])
    monkeypatch.setattr(sys, "located", registry, raising=False)
    assert "located_animals" not in sys.modules
    assert registry.get("Cow") is int


def test_a_dotted_path_is_imported(root):
    """A dotted path to a class or method, with dots or a colon, is imported; a missing one returns None."""
    from fractions import Fraction

    assert root.get("fractions.Fraction") is Fraction
    assert root.get("fractions:Fraction") is Fraction
    assert root.get("fractions.Fraction.from_float") == Fraction.from_float
    assert root.get("fractions.Nothing") is None
    assert root.get("no_such_package.Thing") is None
    assert root.get("math.pi") is None


def test_a_dotted_path_with_a_failing_import_is_a_runtime_error(root, tmp_path, monkeypatch):
    """A module that exists but cannot be imported raises an error, not an unknown name."""
    (tmp_path / "broken_module_here.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TargetImportError, match="broken_module_here failed with ZeroDivisionError"):
        root.get("broken_module_here.Thing")


def test_built_in_entries_are_imported_on_first_use(tmp_path, monkeypatch):
    """A built-in entry is imported on first use, and its name cannot be registered again."""
    (tmp_path / "ready_module.py").write_text("class Zebra: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("animal", scope="ready", builtin_entries={"Zebra": "ready_module:Zebra"})
    assert len(registry) == 1
    assert "ready_module" not in sys.modules
    assert registry.get("Zebra").__name__ == "Zebra"
    with pytest.raises(KeyError, match="already in the animal registry"):
        registry.register_module("Zebra", module=int)


def test_all_torch_optimizers_are_available():
    """All optimizer classes of torch.optim are available by name; Adafactor has an additional name."""
    import torch

    classes = [found for found in vars(torch.optim).values() if isinstance(found, type)]
    assert len(classes) > 10
    for found in classes:
        assert OPTIMIZERS.get(found.__name__) is found
    assert OPTIMIZERS.get("TorchAdafactor") is torch.optim.Adafactor
    assert OPTIMIZERS.get("lr_scheduler") is None


def test_layers_losses_and_metrics_are_available():
    """torch.nn modules and torchmetrics metrics are available by name and by dotted path."""
    import torch
    import torchmetrics

    assert MODELS.get("CrossEntropyLoss") is torch.nn.CrossEntropyLoss
    assert MODELS.get("torch.nn.Linear") is torch.nn.Linear
    assert MODELS.get("functional") is None
    assert METRICS.get("Accuracy") is torchmetrics.Accuracy
    assert METRICS.get("MulticlassAccuracy") is torchmetrics.classification.MulticlassAccuracy
    assert FUNCTIONS.get("default_collate") is torch.utils.data.default_collate


def test_built_in_names_are_listed_without_imports():
    """Built-in schedules, samplers and strategies are listed without being imported."""
    assert len(PARAM_SCHEDULERS) == 32
    assert {"DefaultSampler", "InfiniteSampler"} <= set(DATA_SAMPLERS.names())
    assert {"SingleDeviceStrategy", "DDPStrategy"} <= set(STRATEGIES.names())
    assert EVALUATOR is EVALUATORS


def test_a_missing_library_does_not_hide_other_suggestions():
    """Libraries that are not installed do not affect the listed names."""
    assert "Linear" in MODELS.names()
