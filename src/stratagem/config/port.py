"""Rewrite a Python configuration of MMEngine's Runner into one of this package, keeping its comments."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, final

from stratagem.config.mmcv_keys import MMCV_KEYS
from stratagem.config.reading.placeholders import masked_placeholders
from stratagem.errors import ConfigParsingError

__all__ = ["PORTED_KEYS", "Ported", "port"]

# Visualization back end -> tracker.
_TRACKERS: Final[Mapping[str, str]] = {
    "LocalVisBackend": "csv",
    "TensorboardVisBackend": "tensorboard",
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
}
# Key of MMEngine's Runner -> argument of DDPStrategy.
_DDP_ARGUMENTS: Final[Mapping[str, str]] = {
    "find_unused_parameters": "find_unused_parameters",
    "sync_bn": "sync_bn",
    "model_wrapper_cfg": "model_wrapper",
    "activation_checkpointing": "activation_checkpointing",
}
# Keys without a counterpart, and the reason why they can be left out or what to do instead.
_REMOVED: Final[Mapping[str, str]] = {
    "visualizer": "the trackers record the values; nothing draws samples",
    "tta_model": "test-time augmentation needs `import stratagem.compat.mmengine`",
    "tta_pipeline": "test-time augmentation needs `import stratagem.compat.mmengine`",
    "efficient_conv_bn_eval": "it has no counterpart",
    "runner_type": "there is one Runner",
    "init_weights_for_test_or_val": "it has no counterpart",
}
# All keys that are rewritten or removed.
PORTED_KEYS: Final = frozenset(
    {*_DDP_ARGUMENTS, *_REMOVED, "default_hooks", "default_scope", "log_processor", "vis_backends"}
)
_HOOKS_WITHOUT_COUNTERPART: Final = ("visualization",)
_CUSTOM_HOOKS_WITHOUT_COUNTERPART: Final[Mapping[str, str]] = {
    "EmptyCacheHook": "remove it; PyTorch's allocator reuses memory without it",
    "SyncBuffersHook": "remove it and use strategy=dict(type='DDPStrategy', broadcast_buffers=True)",
    "PrepareTTAHook": "test-time augmentation needs `import stratagem.compat.mmengine`",
    "NaiveVisualizationHook": "remove it; nothing draws samples",
}


@final
@dataclass(frozen=True, slots=True)
class Ported:
    """A rewritten configuration.

    Attributes:
        text: the new contents of the file.
        notes: what was removed or must be changed by hand, each with its line in the original file.
    """

    text: str
    notes: list[str]


def port(text: str, name: str) -> Ported:
    """Rewrite the top-level keys that MMEngine and this package read differently. Comments and all other code stay.

    Removed keys become comments. For bases, see :func:`~stratagem.config.port_files.port_files`.

    Args:
        text: the Python configuration.
        name: the name of the file, for errors and notes.

    Raises:
        ConfigParsingError: if the text is not valid Python; the error includes the line.
    """
    try:
        tree = ast.parse(masked_placeholders(text))
    except (SyntaxError, ValueError) as error:
        raise ConfigParsingError(f"{name}:{getattr(error, 'lineno', 1)} is not valid Python: {error}.") from error
    porter = _Porter(text, name)
    porter.rewrite(tree)
    return Ported(porter.result(), porter.notes)


@final
@dataclass(slots=True)
class _Porter:
    """Collects the edits of one file: spans of bytes and their replacements."""

    text: str
    name: str
    notes: list[str] = field(default_factory=list)
    _edits: list[tuple[int, int, str]] = field(default_factory=list)
    _ddp: list[tuple[ast.Assign, str]] = field(default_factory=list)
    _has_trackers: bool = False

    def rewrite(self, tree: ast.Module) -> None:
        window_size = None
        for statement in tree.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=key)], value=value):
                    if key == "log_processor":
                        window_size = _keywords(value).get("window_size")
                    self._key(statement, key, value)
        for statement in tree.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="default_hooks")], value=ast.Call() as hooks):
                    self._default_hooks(hooks, window_size)
        self._strategy()

    def result(self) -> str:
        """Return the text after all edits."""
        raw = self.text.encode()
        for start, end, new in sorted(self._edits, reverse=True):
            raw = raw[:start] + new.encode() + raw[end:]
        return raw.decode()

    def _key(self, statement: ast.Assign, key: str, value: ast.expr) -> None:
        match key, value:
            case "default_scope", ast.Constant(value="mmengine"):
                self._comment_out(statement, "types are looked up here by default")
            case "vis_backends", ast.List():
                self._trackers(statement, value)
            case "visualizer", _:
                backends = _keywords(value).get("vis_backends")
                if isinstance(backends, ast.List) and not self._has_trackers:
                    self._trackers(statement, backends)
                else:
                    self._comment_out(statement, _REMOVED[key])
            case "log_processor", _:
                self._comment_out(statement, "default_hooks.logger has window_size, and lines are by iteration")
            case "custom_hooks", ast.List(elts=hooks):
                self._custom_hooks(hooks)
            case _ if key in _DDP_ARGUMENTS:
                self._ddp.append((statement, f"{_DDP_ARGUMENTS[key]}={self._source(value)}"))
            case _ if key in _REMOVED:
                self._comment_out(statement, _REMOVED[key])
            case _ if key in MMCV_KEYS:
                self._note(statement, f"{key!r} is a key of MMCV 1. Write {MMCV_KEYS[key]}.")

    def _trackers(self, statement: ast.Assign, backends: ast.List) -> None:
        names = []
        for each in backends.elts:
            kind = _type_of(each)
            if kind is None or kind not in _TRACKERS:
                self._note(each, f"{self._source(each)} has no counterpart among the trackers.")
                continue
            names.append(_TRACKERS[kind])
            if len(_keywords(each)) > 1:
                self._note(
                    each,
                    f"the arguments of {self._source(each)} were dropped; see docs/trackers.md for those of {names[-1]!r}.",
                )
        self._has_trackers = True
        self._replace(statement, f"trackers = [{', '.join(map(repr, names))}]")

    def _default_hooks(self, hooks: ast.Call, window_size: ast.expr | None) -> None:
        for keyword in hooks.keywords:
            if keyword.arg in _HOOKS_WITHOUT_COUNTERPART:
                self._remove_argument(keyword)
                self._note(keyword, f"default_hooks.{keyword.arg} was removed; nothing draws samples.")
            if keyword.arg == "logger" and isinstance(keyword.value, ast.Call):
                for argument in keyword.value.keywords:
                    if argument.arg == "log_metric_by_epoch":
                        self._remove_argument(argument)
                if window_size is not None and isinstance(window_size, ast.Constant):
                    end = self._span(keyword.value)[1] - 1
                    before = self.text.encode()[:end].rstrip()[-1:]
                    separator = "" if before in (b"(", b",") else ", "
                    self._edits.append((end, end, f"{separator}window_size={window_size.value!r}"))

    def _custom_hooks(self, hooks: list[ast.expr]) -> None:
        for hook in hooks:
            advice = _CUSTOM_HOOKS_WITHOUT_COUNTERPART.get(_type_of(hook) or "")
            if advice:
                self._note(hook, f"{_type_of(hook)} has no counterpart: {advice}.")

    def _strategy(self) -> None:
        """Replace the keys that configure DistributedDataParallel with one strategy."""
        arguments = ", ".join(argument for _, argument in self._ddp)
        for index, (statement, _) in enumerate(self._ddp):
            if index == 0:
                self._replace(statement, f'strategy = dict(type="DDPStrategy", {arguments})')
            else:
                self._comment_out(statement, "an argument of strategy")

    def _comment_out(self, statement: ast.stmt, reason: str) -> None:
        start, end = self._span(statement)
        lines = self.text.encode()[start:end].decode().splitlines()
        self._edits.append((start, end, "\n".join(f"# {line}" for line in [f"Not used: {reason}.", *lines])))
        self._note(statement, f"{lines[0].partition('=')[0].strip()} was removed: {reason}.")

    def _remove_argument(self, keyword: ast.keyword) -> None:
        """Remove a keyword argument and the comma after it, or the one before it if it is the last argument."""
        raw = self.text.encode()
        start, end = self._span(keyword)
        after = len(raw[end:]) - len(raw[end:].lstrip())
        if raw[end + after : end + after + 1] == b",":
            end += after + 1
            line_start, line_end = raw.rfind(b"\n", 0, start) + 1, raw.find(b"\n", end) + 1
            is_whole_line = not (raw[line_start:start] + raw[end:line_end]).strip()
            self._edits.append((line_start, line_end, "") if is_whole_line else (start, end, ""))
            return
        before = raw[:start].rstrip()
        self._edits.append((len(before) - 1 if before.endswith(b",") else start, end, ""))

    def _replace(self, node: ast.stmt, new: str) -> None:
        self._edits.append((*self._span(node), new))

    def _span(self, node: ast.stmt | ast.expr | ast.keyword) -> tuple[int, int]:
        lines = self.text.encode().splitlines(keepends=True)

        def offset(line: int, column: int) -> int:
            return sum(map(len, lines[: line - 1])) + column

        last = node.end_lineno or node.lineno
        return offset(node.lineno, node.col_offset), offset(last, node.end_col_offset or node.col_offset)

    def _source(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self.text.encode()[start:end].decode()

    def _note(self, node: ast.stmt | ast.expr | ast.keyword, text: str) -> None:
        self.notes.append(f"{self.name}:{node.lineno}: {text}")


def _keywords(node: ast.expr) -> dict[str, ast.expr]:
    """Return the items of ``dict(a=...)`` or ``{"a": ...}`` by key."""
    return dict(_items(node))


def _items(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
            yield from ((keyword.arg, keyword.value) for keyword in keywords if keyword.arg)
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), value


def _type_of(node: ast.expr) -> str | None:
    kind = _keywords(node).get("type")
    match kind:
        case ast.Constant(value=str(name)):
            return name.rpartition(".")[2]
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None
