"""The public names of MMEngine, and what the OpenMMLab packages import from it, exist in the layer."""

from __future__ import annotations

import pytest

from tests.openmmlab.public_names import MAX_UNSUPPORTED, Comparison, compare_engines, read_differences, unexplained

pytestmark = [pytest.mark.openmmlab, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Return the comparison of both engines."""
    return compare_engines()


def test_no_public_name_is_missing(comparison: Comparison) -> None:
    """Every public name of MMEngine exists, and at most 30 are refused when they are used."""
    assert comparison.missing == ()
    assert len(comparison.unsupported) <= MAX_UNSUPPORTED


def test_all_imports_of_packages_work(comparison: Comparison) -> None:
    """Everything that mmcv, mmpretrain, mmdet and mmsegmentation import from MMEngine exists."""
    assert comparison.missing_imports == ()


def test_methods_and_parameters_are_those_of_mmengine(comparison: Comparison) -> None:
    """Public classes have MMEngine's methods, and functions and methods its parameters, except for listed differences."""
    differences, known = [*comparison.missing_methods, *comparison.other_parameters], read_differences()
    assert unexplained(differences, known) == []
    assert [pattern for pattern in known if unexplained(differences, [pattern]) == differences] == []
