import pytest

from stratagem.utils import nearest_names


@pytest.mark.parametrize(("typo", "meant"), [("rl", "lr"), ("l", "lr"), ("lrs", "lr"), ("ir", "lr"), ("LR", "lr")])
def test_one_typo_is_recognized_in_short_names(typo, meant):
    """A swapped, dropped, added or replaced character is recognized even in short names."""
    assert nearest_names(typo, ["momentum", "lr", "fused"])[0] == meant
