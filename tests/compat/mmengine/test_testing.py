"""Test cases of users that run in several processes."""

from __future__ import annotations

from typing import Any

import pytest

from stratagem.compat.mmengine.testing._internal import MultiProcessTestCase


@pytest.mark.slow
class TestCaseOfUser(MultiProcessTestCase):
    """A test case that prepares its attributes in ``prepare_subprocess`` and ``run_test``, as those of MMEngine's users do."""

    @property
    def world_size(self) -> int:
        return 1

    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()

    def prepare_subprocess(self) -> None:
        self.prepared = True

    def run_test(self, test_name: str, parent_pipe: Any) -> None:
        self.values = [self.rank]
        super().run_test(test_name, parent_pipe)

    def test_attributes_of_an_overridden_run_test_exist(self) -> None:
        """The process of a rank calls the overridden methods before the test method."""
        assert (self.prepared, self.values) == (True, [0])
