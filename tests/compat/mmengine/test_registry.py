"""The registries of the layer: scopes, locations, and errors that name the closest entries."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest

import stratagem.compat.mmengine  # noqa: F401
from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.logging import MessageHub
from stratagem.compat.mmengine.registry import HOOKS, DefaultScope, Registry, init_default_scope
from stratagem.compat.mmengine.utils import ManagerMixin
from stratagem.utils.data_names import DataName


@pytest.fixture(autouse=True)
def no_default_scope() -> Iterator[None]:
    """Run each test without a default scope, and restore it."""
    before, DefaultScope._instance_dict = DefaultScope._instance_dict, OrderedDict()
    yield
    DefaultScope._instance_dict = before


def registry_with(name: str, **kwargs: object) -> Registry:
    """Return a registry with a class of this name, whose objects know their scope."""
    registry = Registry("thing", **kwargs)  # type: ignore[arg-type]
    registry.register_module(name, module=type(name, (), {"scope": registry.scope}))
    return registry


def test_a_name_is_looked_up_in_the_default_scope_first() -> None:
    """The registry of the default scope, which has the root as its parent, takes precedence over the one that builds."""
    root = registry_with("A", scope="one")
    registry_with("A", scope="two", parent=root)
    assert root.build(dict(type="A")).scope == "one"
    init_default_scope("two")
    assert root.build(dict(type="A")).scope == "two"
    assert root.build(dict(type="A", _scope_="one")).scope == "one"
    assert root.build(Config(dict(type="one.A"))).scope == "one"
    assert DefaultScope.get_current_instance().scope_name == "two"


def test_a_registry_is_imported_with_its_library_and_its_locations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``library.Name`` imports ``library.registry``, and its registry imports the modules that register classes."""
    package = tmp_path / "library"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "registry.py").write_text(
        "from mmengine.registry import Registry, HOOKS as ROOT\n"
        "HOOKS = Registry('hook', parent=ROOT, locations=['library.hooks'])\n",
        encoding="utf-8",
    )
    (package / "hooks.py").write_text(
        "from library.registry import HOOKS\n@HOOKS.register_module()\nclass OwnHook:\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert HOOKS.get("library.OwnHook") is sys.modules["library.hooks"].OwnHook
        assert sys.modules["library.registry"].HOOKS.scope == "library"
        assert HOOKS.get("OwnHook") is None
    finally:
        HOOKS.children.pop("library", None)
        for name in [name for name in sys.modules if name.partition(".")[0] == "library"]:
            del sys.modules[name]


def test_built_in_classes_are_found_without_an_import() -> None:
    """A root registry imports the modules that register its classes."""
    assert HOOKS.get("CheckpointHook").__name__ == "CheckpointHook"


def test_an_unknown_name_is_an_error_with_the_closest_names() -> None:
    """The error names the registry and what was probably meant."""
    registry = registry_with("ResNet", scope="own")
    with pytest.raises(KeyError, match=r"ResNt is not in the own::thing registry. Did you mean 'ResNet'\?"):
        registry.build(dict(type="ResNt"))


def test_a_dotted_path_is_imported_unless_a_data_file_has_it() -> None:
    """A name that comes from a YAML, JSON or TOML file never imports a module."""
    registry = Registry("thing", scope="own")
    assert registry.get("collections.OrderedDict") is OrderedDict
    with pytest.raises(ValueError, match="Such files cannot import modules"):
        registry.get(DataName("collections.OrderedDict"))


def test_a_class_with_named_instances_is_built_once() -> None:
    """Building a ``ManagerMixin`` returns the instance with the name."""

    class Named(ManagerMixin):
        def __init__(self, name: str) -> None:
            super().__init__(name)

    registry = Registry("thing", scope="own")
    registry.register_module(module=Named)
    built = registry.build(dict(type="Named", name="a"))
    assert registry.build(dict(type="Named", name="a")) is built is Named.get_instance("a")


def test_a_failing_block_restores_the_default_scope() -> None:
    """Scopes are switched without copying the instances of others."""
    init_default_scope("one")
    before = DefaultScope.get_current_instance()
    seen = []

    def block() -> None:
        with DefaultScope.overwrite_default_scope("two"):
            seen.append(DefaultScope.get_current_instance().scope_name)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        block()
    assert seen == ["two"]
    assert DefaultScope.get_current_instance() is before


def test_names_of_runs_that_start_in_the_same_second_differ() -> None:
    """A second run with the same name has a message hub of its own, so that it does not inherit the best score."""
    name = "run_20261130_060000"
    try:
        first = MessageHub.get_instance(MessageHub.unused_name(name))
        second = MessageHub.get_instance(MessageHub.unused_name(name))
        first.update_info("best_score", 1.0)
        assert (first.instance_name, second.instance_name) == (name, f"{name}_1")
        assert second.get_info("best_score") is None
    finally:
        for used in (name, f"{name}_1"):
            MessageHub._instance_dict.pop(used, None)
