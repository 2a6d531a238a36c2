"""Names that were replaced by standard terms are not used again; ``docs/glossary.md`` defines the terms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "stratagem"

# Complete identifiers, not parts of them; each was replaced by a standard term.
_IDENTIFIERS = """
    ALONE BoostedOptimWrapper BoosterState Boosting Captured ColossalBooster Datable Dealt DealtBatches
    DeferredWatch Driven EngineOptim FilledDataName FilledText ForeignBatches Horizon JOB_ENDS KeptGroup
    Launched Lifeline Lineage NativeWriter OwnValues PlannedPolicy RankWatch ScalarWindow SharedTimer Signpost
    Stretches Stripes Tape Team UpdateWatch WatchedStream WholeMasters WholeParameters WorkerStart WrittenPiece
    ZeroFlat ZeroPartitioned _Anchor _FAREWELL_S _Kept _LAST_WORDS_S _Said _Watched __place__ _as_it_is
    _forget_waiting _obituary _poisoned_buffers _put_back _set_apart _stretch _told a_row_of_each_rank
    accumulation_context always_says_sync and_then bare_model bare_name batches_in_step call_roll calls_go_to
    continue_launch data_share describe_stray drop_window each_wrapper end_interrupted end_process end_within
    find_beside find_place fit_state folder_lock follow_signpost forget_waiting form_of generators_aside
    generators_kept go_on is_admitted join_tree keep_pace kernels_explained local_part may_miss model_part
    most_batches naming_dead_workers note_folder open_window own_buffers own_values place_of placed_like
    point_to read_own_buffers read_window readable_weights refuse_unreasonable rule_of save_orders_at
    set_aside_path signs_of_life size_of split_state split_tree stand_ins take_base_imports take_imports take_up
    training_kept window_state without_exchange without_marks without_memory without_wrapper writable_weights
    write_own_buffers write_stacks write_window
"""
IDENTIFIERS = frozenset(_IDENTIFIERS.split())

# Files, relative to the package.
_FILES = """
    checkpoint/beside.py checkpoint/captured.py checkpoint/inert checkpoint/pieces.py checkpoint/prefixes.py
    checkpoint/purpose.py checkpoint/refusal.py checkpoint/regions.py checkpoint/slices.py
    checkpoint/foreign/contents.py checkpoint/foreign/kinds.py cli/deferred.py cli/handover.py
    config/reading/languages.py data/lifeline.py data/sharing.py data/values.py dist logging/history.py
    optim/many.py optim/per_module.py optim/places.py optim/precision.py optim/sharded.py optim/watch.py
    parallel/detour.py parallel/on_device.py parallel/policies.py parallel/replicated.py parallel/sharded.py
    parallel/tape.py registry/families.py registry/roots.py registry/trust.py sections.py storage/places.py
    strategies/engines strategies/horizon.py strategies/own_buffers.py strategies/own_values.py
    strategies/window.py train/claims.py train/clock.py train/ending.py train/failure.py train/finding.py
    train/lineage.py train/origin.py train/pace.py train/saves.py train/stacks.py train/starts.py
    train/untouched.py utils/places.py
"""
FILES = frozenset(_FILES.split())


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every identifier of a syntax tree with its line."""
    for node in ast.walk(tree):
        names: list[str | None] = []
        match node:
            case ast.Name():
                names = [node.id]
            case ast.Attribute():
                names = [node.attr]
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [node.name]
            case ast.arg() | ast.keyword():
                names = [node.arg]
            case ast.alias():
                names = [node.name, node.asname]
        line = getattr(node, "lineno", 0)
        yield from ((name, line) for name in names if name is not None)


def retired(path: Path) -> list[str]:
    """Return a line for each retired identifier of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [f"{path}:{line}: {name}" for name, line in identifiers(tree) if name in IDENTIFIERS]


@pytest.mark.slow
def test_no_module_uses_a_retired_identifier() -> None:
    """Classes, functions, attributes and arguments use the terms of the glossary."""
    assert [line for path in sorted(SOURCE.rglob("*.py")) for line in retired(path)] == []


def test_no_module_has_a_retired_file_name() -> None:
    """Files and folders that were renamed do not exist under their old names."""
    assert [
        name for name in sorted(FILES) if (SOURCE / name).is_file() or (SOURCE / name / "__init__.py").is_file()
    ] == []


@pytest.mark.parametrize(
    "code", ["def each_wrapper(): ...", "x.drop_window()", "f(may_miss=())", "from a import Tape", "class Horizon: ..."]
)
def test_a_retired_identifier_is_found(tmp_path: Path, code: str) -> None:
    """An identifier is found wherever it can occur: as a class, function, argument, attribute or keyword."""
    path = tmp_path / "module.py"
    path.write_text(code)
    assert len(retired(path)) == 1
