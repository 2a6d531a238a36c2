"""Find the arguments that a class or function accepts, including those that it forwards as ``**kwargs``."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, final

__all__ = ["Arguments", "arguments_of"]

# Methods that read a single key of the keyword arguments.
_READING_METHODS = frozenset({"pop", "get", "setdefault"})


@final
@dataclass(frozen=True, slots=True)
class Arguments:
    """The keyword arguments of a target. ``open`` specifies whether the target may accept any other name."""

    names: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    open: bool = False

    def accepts(self, name: str) -> bool:
        """Return whether the target accepts an argument with this name."""
        return self.open or name in self.names

    def __or__(self, other: Arguments) -> Arguments:
        """Return the arguments that either target accepts.

        Arguments that ``other`` requires may be supplied by the forwarding code.
        """
        names = dict.fromkeys((*self.names, *other.names))
        return Arguments(tuple(names), self.required, self.open or other.open)


_ANYTHING = Arguments(open=True)
_NOTHING = Arguments()


def arguments_of(target: Callable[..., Any]) -> Arguments:
    """Return the arguments that ``target`` accepts.

    ``**kwargs`` is followed through the source code: to the ``__init__`` of a base class, to a function or class of the
    module, or to ``kwargs.pop("name")``. If it cannot be followed, any name is accepted.
    """
    return _cached_arguments_of(target) if isinstance(target, Hashable) else _arguments_of(target)


def _arguments_of(target: Callable[..., Any]) -> Arguments:
    if isinstance(target, functools.partial):
        inner = arguments_of(target.func)
        try:
            bound = inspect.signature(target.func).bind_partial(*target.args, **target.keywords).arguments
        except (TypeError, ValueError):
            return inner
        positional = set(list(bound)[: len(target.args)])
        names = tuple(name for name in inner.names if name not in positional)
        return Arguments(names, inner.required - bound.keys(), inner.open)
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return _ANYTHING
    taken = _declared(parameters)
    if not taken.open:
        return taken
    if isinstance(target, type):
        return _with_forwarded(taken, _forwarded_by_class(target))
    function = inspect.unwrap(target)
    owner = type(target.__self__) if inspect.ismethod(target) and not isinstance(target.__self__, type) else None
    return _with_forwarded(taken, _forwarded(getattr(function, "__func__", function), owner))


# Cached, because reading source code takes a millisecond and is needed twice for each class: to check and to build it.
_cached_arguments_of = functools.lru_cache(maxsize=1024)(_arguments_of)


def _declared(parameters: list[inspect.Parameter]) -> Arguments:
    named = [item for item in parameters if item.kind in {item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY}]
    return Arguments(
        tuple(item.name for item in named),
        frozenset(item.name for item in named if item.default is item.empty),
        any(item.kind is item.VAR_KEYWORD for item in parameters),
    )


def _with_forwarded(taken: Arguments, forwarded: Arguments) -> Arguments:
    return Arguments(taken.names, taken.required) | forwarded


def _forwarded_by_class(target: type) -> Arguments:
    """Return the arguments that the ``**kwargs`` of a constructor may contain."""
    if type(target).__call__ is not type.__call__:
        return _ANYTHING
    for name in ("__new__", "__init__"):
        owner = _owner(target, name)
        if owner is not object:
            return _forwarded(vars(owner)[name], target, owner)
    return _NOTHING


def _owner(target: type, name: str, after: type | None = None) -> type:
    order = target.__mro__
    start = order.index(after) + 1 if after is not None else 0
    return next((owner for owner in order[start:] if name in vars(owner)), object)


def _forwarded(function: Any, cls: type | None, owner: type | None = None) -> Arguments:
    """Return the arguments that the ``**kwargs`` of a function may contain, according to its source code."""
    function = getattr(function, "__func__", function)
    if (
        getattr(function, "__module__", None) == "torch.nn.modules.module"
        and function.__qualname__ == "Module.__init__"
    ):
        return _NOTHING  # torch.nn.Module accepts *args and **kwargs only to raise a better error.
    node = _syntax(function)
    if node is None or node.args.kwarg is None:
        return _ANYTHING if node is None else _NOTHING
    uses = _KwargsUses(node.args.kwarg.arg)
    for statement in node.body:
        uses.visit(statement)
    if uses.has_other_uses:
        return _ANYTHING
    taken = Arguments(tuple(uses.names))
    for call in uses.calls:
        taken |= _remaining(_arguments_of_callee(call.func, function, cls, owner), call)
    return taken


def _remaining(taken: Arguments, call: ast.Call) -> Arguments:
    """Return the arguments that a call still accepts in addition to those written in it."""
    written = {item.arg for item in call.keywords}
    for name, argument in zip(taken.names, call.args, strict=False):
        if isinstance(argument, ast.Starred):
            break
        written.add(name)
    return Arguments(tuple(name for name in taken.names if name not in written), taken.required - written, taken.open)


@functools.lru_cache(maxsize=512)
def _syntax(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


@final
class _KwargsUses(ast.NodeVisitor):
    """Collects how a function uses its ``**kwargs``: the calls and keys, and whether there is any other use."""

    def __init__(self, kwargs: str) -> None:
        self.calls: list[ast.Call] = []
        self.names: list[str] = []
        self.has_other_uses = False
        self._kwargs = kwargs

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Attribute(value=ast.Name(id=name), attr=method) if name == self._kwargs:
                self._method(node, method)
                return
        if any(item.arg is None and self._is_kwargs(item.value) for item in node.keywords):
            self.calls.append(node)
        self.visit(node.func)
        for child in (*node.args, *(item.value for item in node.keywords if item.arg is not None)):
            self.visit(child)
        for item in node.keywords:
            if item.arg is None and not self._is_kwargs(item.value):
                self.visit(item.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self._is_kwargs(node.value) and isinstance(node.slice, ast.Constant):
            self.names.append(str(node.slice.value))
            return
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.In | ast.NotIn) and self._is_kwargs(node.comparators[0]):
            if isinstance(node.left, ast.Constant):
                self.names.append(str(node.left.value))
            self.visit(node.left)
            return
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        # `if kwargs: raise ...` rejects the remaining arguments, and the message may use kwargs.
        if self._is_kwargs(node.test) and isinstance(node.body[-1], ast.Raise):
            for statement in node.orelse:
                self.visit(statement)
            return
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == self._kwargs:
            self.has_other_uses = True

    def _method(self, node: ast.Call, method: str) -> None:
        if method in _READING_METHODS and node.args and isinstance(node.args[0], ast.Constant):
            self.names.append(str(node.args[0].value))
        elif method != "update":
            self.has_other_uses = True
        for child in (*node.args, *(item.value for item in node.keywords)):
            self.visit(child)

    def _is_kwargs(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self._kwargs


def _arguments_of_callee(called: ast.expr, function: Any, cls: type | None, owner: type | None) -> Arguments:
    """Return the arguments of the function to which ``**kwargs`` is forwarded."""
    match called:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name) if (
            cls is not None and owner is not None
        ):
            following = _owner(cls, name, after=owner)
            if following is object:
                return _NOTHING
            method = vars(following)[name]
            method = getattr(method, "__func__", method)
            try:
                taken = _declared(list(inspect.signature(method).parameters.values())[1:])
            except (TypeError, ValueError):
                return _ANYTHING
            return _with_forwarded(taken, _forwarded(method, cls, following)) if taken.open else taken
    names = list(_dotted(called))
    found: Any = getattr(function, "__globals__", {}).get(names[0]) if names else None
    for name in names[1:]:
        found = getattr(found, name, None)
    return arguments_of(found) if callable(found) and found is not function else _ANYTHING


def _dotted(node: ast.expr) -> Iterator[str]:
    """Yield the names of ``a.b.c``; yield nothing for other expressions."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id
        yield from reversed(names)
