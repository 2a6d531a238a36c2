"""The page of all configuration keys, from the schema of configurations and the docstrings of what the keys build."""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from docs.site import docstrings
from docs.site.entry import Entry, Page
from stratagem.config import Rule, Section
from stratagem.config_schema import SECTIONS
from stratagem.runner import Runner
from stratagem.utils.signatures import arguments_of

__all__ = ["configuration_page", "keys", "texts"]

_TEXTS: Final = Path(__file__).with_name("config_keys.toml")
# The page of the reference that lists the entries of a registry, by the name of the registry.
_REGISTRY_PAGES: Final = {
    "model": "models",
    "optimizer": "optimizers",
    "optimizer wrapper": "optimizers",
    "optimizer wrapper constructor": "optimizers",
    "parameter scheduler": "schedules",
    "strategy": "strategies",
    "loop": "runs",
    "hook": "hooks",
    "data sampler": "samplers",
    "function": "samplers",
    "metric": "metrics",
    "evaluator": "metrics",
    "tracker": "trackers",
}
_DEPTH: Final = 3
# Keys that the configuration check rejects, although the function that it calls has arguments with these names.
_REJECTED: Final = frozenset({f"env_cfg.dist_cfg.{name}" for name in ("world_size", "rank", "store", "_ranks")})


@functools.cache
def texts() -> Mapping[str, str]:
    """Return the descriptions of keys that no docstring describes, by the path of the key."""
    return tomllib.loads(_TEXTS.read_text(encoding="utf-8"))["keys"]


def keys() -> Iterator[tuple[str, Section, str]]:
    """Yield the path of each key with its schema and its description, which is empty if there is none."""
    described = docstrings.read(Runner).items("args")
    for name, rule in SECTIONS.items():
        yield from _below(name, rule, _text(name) or described.get(name, ""), 1)
    for name in ("custom_imports", "_base_", "vars"):
        yield name, Section(), _text(name)


def _text(path: str) -> str:
    return texts().get(path) or texts().get(f"*.{path.rpartition('.')[2]}", "")


def _below(path: str, rule: Rule, description: str, depth: int) -> Iterator[tuple[str, Section, str]]:
    section = _resolved(rule)
    yield path, section, description
    if depth == _DEPTH:
        return
    arguments = _arguments(section)
    for key, inner in section.keys.items():
        yield from _below(f"{path}.{key}", inner, _text(f"{path}.{key}") or arguments.pop(key, ""), depth + 1)
    for key, text in arguments.items():
        if key not in section.keys and f"{path}.{key}" not in _REJECTED:
            yield f"{path}.{key}", Section(), _text(f"{path}.{key}") or text or _of_torch(section)


def _of_torch(section: Section) -> str:
    """Return a description for arguments of torch that torch does not describe."""
    target = section.target or ""
    return f"An argument of `{target.replace(':', '.')}`." if target.startswith("torch") else ""


def _resolved(rule: Rule) -> Section:
    return rule if isinstance(rule, Section) else rule({})


def _arguments(section: Section) -> dict[str, str]:
    """Return the arguments of what a section builds by default, with their descriptions."""
    target = _target(section)
    if target is None:
        return {}
    described: dict[str, str] = {}
    for source in (target, *getattr(target, "__mro__", ()), getattr(target, "__init__", None)):
        doc = docstrings.read(source) if source is not None and source is not object else docstrings.Docstring()
        described = {**doc.items("attributes"), **doc.items("args"), **described}
    return {name: described.get(name, "") for name in arguments_of(target).names if name not in section.supplied}


def _target(section: Section) -> Any:
    if section.target is not None:
        module, _, name = section.target.partition(":")
        return getattr(importlib.import_module(module), name)
    return section.registry.get(section.default_type) if section.registry is not None and section.default_type else None


def configuration_page(link: Callable[[str], str | None]) -> Page:
    """Return the page."""
    every = list(keys())
    lines = [
        "# Configuration keys",
        "",
        "A configuration is a `.py`, `.yaml`, `.json` or `.toml` file with these keys; in Python, most of them are arguments "
        "of [`Runner`](runs.md#runner). Unknown keys are errors. The [guide](../guide.md#configurations) describes how files "
        "inherit from each other, and `stratagem config check` checks a file.",
        "",
        "| key | |",
        "|---|---|",
    ]
    tops = [(path, text) for path, _, text in every if "." not in path]
    lines += [f"| [`{path}`](#{path}) | {_cell(text, link)} |" for path, text in tops]
    entries = [Entry(path, "configuration") for path, _, _ in every]
    for top, _ in tops:
        own = [(path, section, text) for path, section, text in every if path == top or path.startswith(f"{top}.")]
        if len(own) == 1 and own[0][1].registry is None:
            lines += ["", f"## `{top}`", "", _sentence(own[0][2], link)]
            continue
        lines += ["", f"## `{top}`", "", _sentence(own[0][2], link), "", *_built(own[0][1]), "| key | |", "|---|---|"]
        lines += [
            f"| `{path.removeprefix(f'{top}.')}` | {_cell(text, link)}{_types(section)} |"
            for path, section, text in own[1:]
        ]
        if len(own) == 1:
            del lines[-2:]
    return Page("configuration", "Configuration keys", "\n".join(lines), tuple(entries))


def _built(section: Section) -> Iterator[str]:
    if section.registry is not None:
        default = (
            f" By default, `type` is `{section.default_type}`, whose keys are listed here."
            if section.default_type
            else ""
        )
        page = _REGISTRY_PAGES.get(section.registry.name)
        listed = (
            f"The possible values of `type` are listed under [{page}]({page}.md)."
            if page
            else "Your program registers the possible values of `type`."
        )
        yield f"{listed}{default}"
        yield ""


def _types(section: Section) -> str:
    if section.registry is None:
        return ""
    page = _REGISTRY_PAGES.get(section.registry.name)
    return f" ([types]({page}.md))" if page else ""


def _cell(text: str, link: Callable[[str], str | None]) -> str:
    return _sentence(" ".join(text.split()), link).replace("|", "\\|")


def _sentence(text: str, link: Callable[[str], str | None]) -> str:
    """Return the Markdown of a description, which begins with a lower-case letter in docstrings."""
    return docstrings.inline(text[:1].upper() + text[1:], link)
