"""The generated reference describes every public name, registry entry, command, option and configuration key."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import typer

import stratagem
from docs.site import docstrings, reference
from docs.site.config_keys import keys
from docs.site.entry import Page
from stratagem import builtin_entries
from stratagem.cli.app import app
from stratagem.config_schema import SECTIONS

# Importing all registered classes also imports the TorchScript compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

REGISTRIES = [name for name in dir(builtin_entries) if name.isupper() and not name.startswith("_")]
# Arguments that a run passes, so that no configuration contains them.
SUPPLIED = {
    "run", "dataloader", "evaluator", "val_loop", "accumulative_counts", "dataset", "rank", "world_size", "seed", "sampler",
    "batch_size", "optimizer", "model", "prepared", "optim_wrapper_cfg", "args", "kwargs", "samples", "params", "device",
}  # fmt: skip


@functools.cache
def pages() -> dict[str, Page]:
    return {page.name: page for page in reference.pages()}


@functools.cache
def described() -> frozenset[str]:
    return frozenset(entry.name for page in pages().values() for entry in page.entries)


@pytest.mark.parametrize("package", reference.PACKAGES)
def test_every_public_name_is_on_a_page(package: str) -> None:
    """Each name in ``__all__`` of a public package is described, under the name by which it is imported."""
    module = importlib.import_module(package)
    names = [f"{package}.{name}" for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    assert [name for name in names if name not in described()] == []
    for name in names:
        link = reference.link_of(name)
        if link is not None and name != "stratagem.__version__":
            page, anchor = link.split(".md#")
            headings = {
                reference.anchor(line[3:]) for line in pages()[page].text.splitlines() if line.startswith("## ")
            }
            assert anchor in headings, name


def test_every_package_is_public_or_declared_internal() -> None:
    """A new package with public names must be added to the reference, or declared internal with a reason."""
    packages = [
        each.name
        for each in pkgutil.walk_packages(stratagem.__path__, "stratagem.")
        # MMEngine's documentation describes the interface of compat.mmengine.
        if each.ispkg and ".compat" not in each.name and getattr(importlib.import_module(each.name), "__all__", None)
    ]
    assert [name for name in packages if name not in reference.PACKAGES and name not in reference.INTERNAL] == []


@pytest.mark.parametrize("registry", REGISTRIES)
def test_every_builtin_entry_is_on_a_page(registry: str) -> None:
    """Each name that a registry contains from the start is described."""
    assert [name for name in getattr(builtin_entries, registry) if f"{registry}: {name}" not in described()] == []


@pytest.mark.parametrize(
    "registry", ["STRATEGIES", "HOOKS", "LOOPS", "DATA_SAMPLERS", "PARAM_SCHEDULERS", "MODELS", "OPTIM_WRAPPERS"]
)
def test_every_argument_of_a_builtin_entry_is_described(registry: str) -> None:
    """The docstring of a class that configurations build, or of its bases, describes each of its arguments."""
    missing = []
    for name, source in getattr(builtin_entries, registry).items():
        target = getattr(importlib.import_module(source.partition(":")[0]), source.partition(":")[2])
        words = reference.descriptions(target)
        arguments = set(inspect.signature(target).parameters) - SUPPLIED
        missing += [f"{name}.{argument}" for argument in sorted(arguments) if not words.get(argument)]
    assert missing == []


def declared(group: typer.Typer, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield each command and the function that declares it."""
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{prefix} {command.name or command.callback.__name__.rstrip('_')}", command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from declared(inner.typer_instance, f"{prefix} {inner.name}")


@pytest.mark.parametrize(
    ("command", "function"), list(declared(app, "stratagem")), ids=lambda value: str(getattr(value, "__name__", value))
)
def test_every_command_and_option_is_on_a_page(command: str, function: Any) -> None:
    """Each option of a command, as its function declares it, is described with a help text."""
    page = pages()["commands"].text
    assert f"## {command}\n" in page
    section = page.split(f"## {command}\n")[1].split("\n## ")[0]
    for name, annotation in typing.get_type_hints(function, include_extras=True).items():
        metadata = getattr(annotation, "__metadata__", ())
        for option in (each for each in metadata if isinstance(each, typer.models.OptionInfo) and not each.hidden):
            assert option.help, (command, name)
            # In annotations, typer stores the first declaration as the default.
            first = (option.default,) if isinstance(option.default, str) else ()
            declarations = (*first, *(option.param_decls or ())) or (f"--{name.replace('_', '-')}",)
            flags = tuple(flag for each in declarations for flag in each.split("/"))
            if flags != ("--traceback",):
                assert [flag for flag in flags if f"`{flag}" not in section] == [], command


def test_every_configuration_key_is_described() -> None:
    """Each key of the schema is on the page, with a description from a docstring or from config_keys.toml."""
    found = {path: text for path, _, text in keys()}
    assert set(SECTIONS) <= set(found)
    assert [path for path, text in found.items() if not text.strip()] == []
    page = pages()["configuration"].text
    assert [path for path in found if f"`{path.partition('.')[2] or path}`" not in page] == []


def test_arguments_of_a_docstring_are_read_with_their_continuation_lines() -> None:
    """Types in parentheses, several names in one item, and wrapped lines are understood."""
    doc = docstrings.parse(
        "Do it.\n\nMore.\n\nArgs:\n    first (int, optional): a number\n        in two lines.\n    second, third: two.\n\n"
        "Raises:\n    ValueError: if not.\n"
    )
    assert doc.summary == "Do it."
    assert doc.items("args") == {"first": "a number\nin two lines.", "second": "two.", "third": "two."}
    assert doc.items("raises") == {"ValueError": "if not."}


def test_roles_in_docstrings_become_links() -> None:
    """A role with a known target becomes a link; others become code."""
    text = docstrings.inline("See :class:`~stratagem.train.Hook` and :func:`f`.", {"stratagem.train.Hook": "h.md"}.get)
    assert text == "See [`Hook`](h.md) and `f()`."
