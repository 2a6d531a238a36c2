import pytest

from stratagem.utils import nearest_names


@pytest.mark.parametrize(("slip", "meant"), [("rl", "lr"), ("l", "lr"), ("lrs", "lr"), ("ir", "lr"), ("LR", "lr")])
def test_one_slip_of_the_fingers_is_recognised_in_short_names(slip, meant):
    """Two characters swapped, one dropped, added or replaced lead to the name, however short it is."""
    assert nearest_names(slip, ["momentum", "lr", "fused"])[0] == meant
