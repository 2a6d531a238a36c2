"""Write the reference from the code: the public classes and functions, the registries, the commands and the configuration keys.

``python -m docs.site.reference FOLDER`` writes the pages to a folder. They are Markdown for MyST and are not committed.
"""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import re
import sys
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
import torchmetrics

import stratagem
from docs.site import docstrings
from docs.site.commands import commands_page
from docs.site.config_keys import configuration_page
from docs.site.docstrings import Docstring
from docs.site.entry import Entry, Page
from stratagem import builtin_entries, registry
from stratagem.train import EVENTS, Hook

__all__ = ["INTERNAL", "PACKAGES", "pages", "write"]

# The page of each registry; reference.toml has the titles of the pages.
_REGISTRIES: Final[Mapping[str, str]] = {
    "STRATEGIES": "strategies",
    "HOOKS": "hooks",
    "PARAM_SCHEDULERS": "schedules",
    "OPTIMIZERS": "optimizers",
    "OPTIM_WRAPPERS": "optimizers",
    "OPTIM_WRAPPER_CONSTRUCTORS": "optimizers",
    "DATA_SAMPLERS": "samplers",
    "FUNCTIONS": "samplers",
    "LOOPS": "runs",
    "RUNNERS": "runs",
    "MODELS": "models",
    "METRICS": "metrics",
    "EVALUATORS": "metrics",
    "TRACKERS": "trackers",
}

# Public packages, and the page of their names that have no other page.
PACKAGES: Final[Mapping[str, str]] = {
    "stratagem": "python",
    "stratagem.runner": "runs",
    "stratagem.train": "runs",
    "stratagem.train.hooks": "hooks",
    "stratagem.train.tools": "runs",
    "stratagem.train.trackers": "trackers",
    "stratagem.strategies": "strategies",
    "stratagem.model": "models",
    "stratagem.data": "samplers",
    "stratagem.optim": "optimizers",
    "stratagem.optim.schedules": "schedules",
    "stratagem.checkpoint": "checkpoints",
    "stratagem.trace": "traces",
    "stratagem.dist": "distributed",
    "stratagem.config": "config-api",
    "stratagem.registry": "registries",
    "stratagem.errors": "errors",
}

# Packages whose names are internal, each with the reason.
INTERNAL: Final[Mapping[str, str]] = {
    "stratagem.checkpoint.foreign": "used by load_checkpoint",
    "stratagem.checkpoint.restricted_unpickler": "used by load_checkpoint",
    "stratagem.distributed": "public as stratagem.dist",
    "stratagem.engines.deepspeed": "public as stratagem.strategies",
    "stratagem.hardware": "used by stratagem plan",
    "stratagem.logging": "used by hooks",
    "stratagem.parallel": "used by strategies",
    "stratagem.storage": "used by checkpoints",
    "stratagem.utils": "helper functions",
}

_SHORT: Final = 60
_UNREADABLE: Final = re.compile(r"<.*>|\bobject at\b")


@final
@dataclass(slots=True)
class _Found:
    """A public object: where it is described, and the names under which registries and packages have it."""

    target: Any
    name: str
    page: str
    registries: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)


@functools.cache
def _entries() -> tuple[_Found, ...]:
    """Return all public objects in the order of the reference; each is described on one page."""
    found: dict[int, _Found] = {}
    for name, page in _REGISTRIES.items():
        for entry, source in getattr(builtin_entries, name, {}).items():
            target = _imported(source)
            described = found.setdefault(
                id(target) if target is not None else hash(source), _Found(target, entry, page)
            )
            described.registries.append(f"{name}: {entry}")
            if target is None:
                described.imports.append(source.replace(":", "."))
    for package, page in PACKAGES.items():
        module = importlib.import_module(package)
        for name in module.__all__:
            target = getattr(module, name)
            if isinstance(target, types.ModuleType) or name == "__version__":
                continue
            described = found.setdefault(_identity(target, name), _Found(target, name, page))
            described.imports.append(f"{package}.{name}")
    return tuple(_with_page(each) for each in found.values())


def _identity(target: Any, name: str) -> int:
    return id(target) if isinstance(target, type) or inspect.isroutine(target) else hash((name, repr(target)))


def _with_page(found: _Found) -> _Found:
    # The names in stratagem itself are described on the page of their package.
    if found.page == "python":
        home = next((name for name in found.imports[1:]), None)
        package = home.rpartition(".")[0] if home else _package_of(found.target)
        found.page = PACKAGES[package] if package != "stratagem" else "runs"
    kind = found.target
    if isinstance(kind, type) and issubclass(kind, Hook):
        found.page = "hooks"
    elif found.name in ("BaseMetric", "Evaluator"):
        found.page = "metrics"
    elif found.name.endswith(("Strategy", "Components")):
        found.page = "strategies"
    elif found.page == "optimizers" and any(path.startswith("stratagem.optim.schedules.") for path in found.imports):
        found.page = "schedules"
    return found


def _package_of(target: Any) -> str:
    module = getattr(target, "__module__", "stratagem")
    return max((package for package in PACKAGES if f"{module}.".startswith(f"{package}.")), key=len)


def _imported(source: str) -> Any:
    module, _, name = source.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:  # an engine that is not installed
        return None


def _path_of(found: _Found) -> str:
    """Return the shortest dotted name under which users import an object."""
    public = [name for name in found.imports if name.rpartition(".")[2] == found.name] or found.imports
    if public:
        return min(public, key=lambda name: (name.count("."), name))
    return f"{found.target.__module__}.{found.target.__qualname__}"


@functools.cache
def _links() -> Mapping[str, str]:
    """Return the link of each dotted name, also by its last part if only one object has it."""
    links: dict[str, str] = {}
    for found in _entries():
        link = f"{found.page}.md#{anchor(found.name)}"
        for name in (*found.imports, _path_of(found), found.name):
            links[name] = link
        if hasattr(found.target, "__qualname__"):
            links[f"{found.target.__module__}.{found.target.__qualname__}"] = link
    return links


def link_of(name: str) -> str | None:
    """Return the link from a page of the reference to the description of a dotted name."""
    links = _links()
    return links.get(name) or links.get(f"stratagem.{name}")


def anchor(name: str) -> str:
    """Return the anchor of the heading of a name."""
    return name.lower().replace(".", "")


def text(raw: str) -> str:
    """Return the Markdown of the text of a docstring."""
    return docstrings.inline(raw, link_of)


def _describe(found: _Found) -> str:
    lines = [f"## {found.name}", ""]
    path = _path_of(found)
    if found.target is None:
        return "\n".join(
            (*lines, f"`{path}`, if the package is installed; its documentation describes the arguments.", "")
        )
    if isinstance(found.target, type):
        lines += _class(found, path)
    elif inspect.isroutine(found.target):
        lines += _routine(found.target, path, "function")
    else:
        lines += _value(found.target, path)
    return "\n".join((*lines, ""))


def _class(found: _Found, path: str) -> Iterator[str]:
    target = found.target
    doc = docstrings.read(target)
    kind = "exception" if issubclass(target, BaseException) else "class"
    yield from _directive(kind, f"{path}{_signature(target)}", 5)
    if found.registries:
        names = [each.split(": ") for each in found.registries]
        yield f"Registered as {', '.join(f'`{name}` in `{kind}`' for kind, name in names)}."
        yield ""
    bases = [base for base in target.__bases__ if base is not object and not base.__name__.startswith("_")]
    if bases:
        yield f"Base{'s' if len(bases) > 1 else ''}: {', '.join(_reference(base) for base in bases)}"
        yield ""
    yield text(doc.text)
    yield ""
    yield from _arguments(target, doc)
    yield from _sections(doc)
    for name, member in _members(target):
        yield from _member(name, member)
    yield ":" * 5


def _reference(kind: type) -> str:
    full = f"{kind.__module__}.{kind.__qualname__}"
    link = link_of(full) if kind.__module__.startswith("stratagem") else None
    return f"[`{kind.__name__}`]({link})" if link else f"`{full.removeprefix('builtins.')}`"


def _members(target: type) -> Iterator[tuple[str, Any]]:
    """Yield the documented public methods, properties and enumeration members that a class adds to its documented bases."""
    if issubclass(target, enum.Enum):
        return
    own = [base for base in target.__mro__ if base is target or _is_undocumented_base(base)]
    seen: set[str] = set()
    for base in own:
        for name, member in vars(base).items():
            if (
                name.startswith("_")
                or name in seen
                or (target is not Hook and issubclass(target, Hook) and name in EVENTS)
            ):
                continue
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(function, functools.cached_property):
                function = function.func
            if not inspect.isfunction(function) or not (function.__doc__ or "").strip():
                continue
            seen.add(name)
            yield name, member


def _is_undocumented_base(base: type) -> bool:
    return base.__module__.startswith("stratagem") and link_of(f"{base.__module__}.{base.__qualname__}") is None


def _member(name: str, member: Any) -> Iterator[str]:
    if isinstance(member, property | functools.cached_property):
        function = member.fget if isinstance(member, property) else member.func
        yield from _directive("property", name, 4)
        yield text(docstrings.read(function).text)
        yield ":" * 4
        yield ""
        return
    bound = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    option = (
        ":classmethod:"
        if isinstance(member, classmethod)
        else ":staticmethod:"
        if isinstance(member, staticmethod)
        else None
    )
    yield from _routine(
        bound, name, "method", option=option, drops_first=not isinstance(member, staticmethod), colons=4
    )


def _routine(
    function: Any, path: str, kind: str, *, option: str | None = None, drops_first: bool = False, colons: int = 5
) -> Iterator[str]:
    doc = docstrings.read(function)
    yield from _directive(kind, f"{path}{_signature(function, drops_first=drops_first)}", colons, option)
    yield text(doc.text)
    yield ""
    yield from _arguments(function, doc)
    yield from _sections(doc)
    yield ":" * colons
    yield ""


def _directive(kind: str, signature: str, colons: int, option: str | None = None) -> Iterator[str]:
    yield f"{':' * colons}{{py:{kind}}} {signature}"
    if option:
        yield option
    yield ""


def _value(target: Any, path: str) -> Iterator[str]:
    shown = repr(target)
    yield from _directive("data", path, 5)
    if len(shown) > 6 * _SHORT or _UNREADABLE.search(shown):
        yield (
            f"Type: `{type(target).__name__}`."
            if not isinstance(target, registry.Registry)
            else (f"The registry of names for a {target.name}.")
        )
    else:
        yield f"`{shown}`"
    yield ":" * 5


def _arguments(target: Any, doc: Docstring) -> Iterator[str]:
    described = descriptions(target)
    rows = [
        (parameter, described[parameter.name])
        for parameter in _parameters(target)
        if parameter.name in described and parameter.name not in ("self", "cls")
    ]
    known = {parameter.name for parameter, _ in rows}
    extra = {name: words for name, words in doc.items("args").items() if name not in known}
    if rows or extra:
        yield "**Arguments**"
        yield ""
    for parameter, words in rows:
        yield f"- **`{parameter.name}`**{_default(parameter)}: {_indented(words)}"
    for name, words in extra.items():
        yield f"- **`{name}`**: {_indented(words)}"
    yield ""


def _indented(words: str) -> str:
    return text(words).replace("\n", "\n  ")


def descriptions(target: Any) -> dict[str, str]:
    """Return the descriptions of the arguments of a class or function, also of those of its bases and settings."""
    found: dict[str, str] = {}
    sources: list[Any] = [target]
    if isinstance(target, type):
        settings = getattr(target, "settings_type", None)
        sources = [base for base in target.__mro__ if base.__module__.startswith("stratagem")] or [target]
        sources.extend(base.__init__ for base in tuple(sources) if "__init__" in vars(base))
        if isinstance(settings, type):
            sources[1:1] = settings.__mro__
    for source in sources:
        doc = docstrings.read(source)
        for section in ("args", "attributes"):
            for name, words in doc.items(section).items():
                found.setdefault(name, words)
    return found


def _parameters(target: Any) -> Sequence[inspect.Parameter]:
    try:
        return tuple(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return ()


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    shown = _shown(parameter.default)
    return f" (default `{shown}`)" if shown != "..." else ""


def _shown(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__name__
    shown = repr(value)
    return "..." if len(shown) > _SHORT or _UNREADABLE.search(shown) else shown


def _signature(target: Any, *, drops_first: bool = False) -> str:
    if isinstance(target, type) and (issubclass(target, BaseException | enum.Enum) or _is_abstract_protocol(target)):
        return ""
    parameters = list(_parameters(target))[1 if drops_first else 0 :]
    parts: list[str] = []
    named_only = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not named_only:
            named_only = True
            parts.append("*")
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        named_only = named_only or prefix == "*"
        part = f"{prefix}{parameter.name}"
        annotation = _annotation(parameter)
        if annotation:
            part += f": {annotation}"
        if parameter.default is not parameter.empty:
            part += f"{' = ' if annotation else '='}{_shown(parameter.default)}"
        parts.append(part)
    return f"({', '.join(parts)})"


def _is_abstract_protocol(target: type) -> bool:
    return bool(getattr(target, "_is_protocol", False))


def _annotation(parameter: inspect.Parameter) -> str:
    value = parameter.annotation
    if value is parameter.empty:
        return ""
    shown = (
        value if isinstance(value, str) else getattr(value, "__name__", "") if isinstance(value, type) else repr(value)
    )
    shown = shown.replace("typing.", "").replace("collections.abc.", "")
    return "" if _UNREADABLE.search(shown) or len(shown) > _SHORT or "\n" in shown else shown


def _sections(doc: Docstring) -> Iterator[str]:
    for name in ("returns", "yields"):
        if name in doc.sections:
            yield f"**{name.title()}:** {text(doc.sections[name])}"
            yield ""
    for name in ("attributes", "raises"):
        items = doc.items(name)
        if items and not (name == "attributes" and doc.items("args")):
            yield f"**{name.title()}**"
            yield ""
            for item, words in items.items():
                link = link_of(item) if name == "raises" else None
                yield f"- {f'[`{item}`]({link})' if link else f'**`{item}`**'}: {_indented(words)}"
            yield ""
        elif name in doc.sections and not items and name == "raises":
            yield f"**Raises:** {text(doc.sections[name])}"
            yield ""
    if "examples" in doc.sections:
        yield f"```python\n{doc.sections['examples']}\n```"
        yield ""


def _summary(target: Any) -> str:
    return text(docstrings.read(target).summary) if target is not None and not isinstance(target, str) else ""


def _found_by_sources(name: str) -> Iterator[str]:
    """Yield what a registry finds in other libraries."""
    if name == "OPTIMIZERS":
        yield _library(torch.optim, torch.optim.Optimizer, registry.OPTIMIZERS)
        yield (
            "Names that start with `schedulefree.`, `heavyball.`, `bitsandbytes.` and `colossalai.` are classes of these "
            "packages, if they are installed."
        )
    elif name == "METRICS":
        yield _library(torchmetrics, torchmetrics.Metric, registry.METRICS)
    elif name == "MODELS":
        yield (
            "`timm.NAME` and `torchvision.NAME` call `timm.create_model` and `torchvision.models.get_model` with this name. "
            "`transformers.CLASS`, `transformers.CLASS.from_pretrained` and `transformers.CLASS.from_config` create models of "
            "transformers."
        )
        yield _library(torch.nn, torch.nn.Module, registry.MODELS)


def _library(module: types.ModuleType, base: type, source: registry.Registry) -> str:
    members = vars(module).items()
    names = sorted(
        name
        for name, found in members
        if isinstance(found, type)
        and issubclass(found, base)
        and not name.startswith("_")
        and source.get(name) is found
    )
    listed = ", ".join(f"`{name}`" for name in names)
    return f"All {len(names)} classes of `{module.__name__}` are registered by their names: {listed}."


def pages() -> list[Page]:
    """Return all pages of the reference."""
    sources: dict[str, list[str]] = {}
    for name, page in _REGISTRIES.items():
        sources.setdefault(page, []).extend(_found_by_sources(name))
    titles = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    found = [
        _object_page(page, text["title"], text["introduction"], sources.get(page, ()))
        for page, text in titles.items()
        if page != "python"
    ]
    return [_python_page(), configuration_page(link_of), commands_page(), *found]


def _object_page(name: str, title: str, intro: str, sources: Iterable[str]) -> Page:
    entries = [found for found in _entries() if found.page == name]
    lines = [f"# {title}", "", intro, "", "| name | |", "|---|---|"]
    lines += [f"| [`{found.name}`](#{anchor(found.name)}) | {_cell(found)} |" for found in entries]
    lines += ["", *(line for source in sources for line in (source, "")), *(_describe(found) for found in entries)]
    known = [Entry(name, found.page) for found in entries for name in (found.name, *found.imports, *found.registries)]
    return Page(name, title, "\n".join(lines), tuple(known))


def _cell(found: _Found) -> str:
    if found.target is None:
        return f"`{_path_of(found)}`"
    described = isinstance(found.target, type) or inspect.isroutine(found.target)
    return _summary(found.target).replace("|", "\\|") if described else ""


def _python_page() -> Page:
    lines = [
        "# Python API",
        "",
        "These names are imported from `stratagem`. They are loaded on first use, so `import stratagem` is fast.",
        "",
        "| name | |",
        "|---|---|",
    ]
    for name in stratagem.__all__:
        target = getattr(stratagem, name)
        if name == "__version__":
            lines.append("| `__version__` | The version of the package. |")
        elif isinstance(target, types.ModuleType):
            lines.append(f"| [`{name}`](traces.md) | {_summary(target)} |")
        else:
            summary = _summary(target) if isinstance(target, type) or inspect.isroutine(target) else "A registry."
            lines.append(f"| [`{name}`]({link_of(f'stratagem.{name}')}) | {summary} |")
    lines += ["", "Further packages:", "", "| package | |", "|---|---|"]
    for package, page in PACKAGES.items():
        if package != "stratagem":
            lines.append(f"| [`{package}`]({page}.md) | {_summary(importlib.import_module(package))} |")
    names = [f"stratagem.{name}" for name in stratagem.__all__]
    return Page("python", "Python API", "\n".join(lines), tuple(Entry(name, "python") for name in names))


def write(folder: Path) -> list[Page]:
    """Write all pages to a folder, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for page in written:
        (folder / f"{page.name}.md").write_text(f"{page.text.rstrip()}\n", encoding="utf-8")
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
