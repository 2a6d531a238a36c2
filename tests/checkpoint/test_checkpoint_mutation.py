"""A checkpoint with random changes to its bytes is never silently loaded as a different one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.errors import CheckpointDamagedError, CheckpointError
from tests.support.properties import examples
from tests.support.sweeps.trial import same, state


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, float, float, bytes]]:
    """Draw changes: a kind, two positions as fractions of the file, and bytes."""
    kinds = st.sampled_from(["overwrite", "insert", "delete", "copy", "reverse", "other"])
    share = st.floats(0, 1)
    return draw(st.lists(st.tuples(kinds, share, share, st.binary(min_size=1, max_size=16)), min_size=1, max_size=4))


def mutate(data: bytes, other: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    """Change bytes; ``other`` is the same file of another checkpoint."""
    for kind, first, second, new in changes:
        begin, end = sorted((int(first * len(data)), int(second * len(data))))
        at = int(first * len(data))
        data = {
            "overwrite": data[:at] + new + data[at + len(new) :],
            "insert": data[:at] + new + data[at:],
            "delete": data[:begin] + data[end:],
            "copy": data[:begin] + data[begin:end] * 2 + data[end:],
            "reverse": data[:begin] + data[begin:end][::-1] + data[end:],
            "other": data[:begin] + other[begin:end] + data[end:],
        }[kind]
    return data


@pytest.mark.parametrize("name", ["", ".pth"])
@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 3), changes=mutations())
def test_a_mutated_checkpoint_is_rejected_or_unchanged(
    tmp_path: Path, name: str, number: int, changes: list[tuple[str, float, float, bytes]]
) -> None:
    """Random changes to any file give a CheckpointError or the saved state, but never a different state.

    A single file that is completely replaced by that of another checkpoint may load as that checkpoint.
    """
    sound, other, path = (tmp_path / f"{which}{name}" for which in ("sound", "other", "mutated"))
    if not sound.exists():
        save_checkpoint(state(1), sound)
        save_checkpoint(state(2), other)
    shutil.rmtree(path, ignore_errors=True)
    if name:
        file, twin = path, other
        shutil.copy(sound, path)
    else:
        shutil.copytree(sound, path)
        file = sorted(path.iterdir())[number]
        twin = other / file.name
    file.write_bytes(mutate(file.read_bytes(), twin.read_bytes(), changes))
    try:
        found = CheckpointLoader.load_checkpoint(path)
    except CheckpointError:
        return
    assert same(found, state(1)) or (name and same(found, state(2)))


@pytest.mark.slow
def test_every_flipped_bit_of_a_single_file_is_damage_or_has_no_effect(tmp_path: Path) -> None:
    """A flipped bit raises only a CheckpointError; other exceptions would prevent resuming from an older checkpoint."""
    path = tmp_path / "iter_1.pth"
    save_checkpoint(state(1), path)
    data = path.read_bytes()
    for offset in range(len(data)):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        try:
            found = CheckpointLoader.load_checkpoint(path)
        except CheckpointDamagedError:
            continue
        assert same(found, state(1))
