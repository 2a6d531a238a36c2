import copy
import pickle

import pytest

from stratagem.config import Config, ConfigDict


def test_keys_are_attributes_at_every_depth():
    """Nested dicts, also those in lists and tuples, are read as attributes."""
    node = ConfigDict(model={"stages": [{"depth": 3}], "pair": ({"width": 4},)})
    assert node.model.stages[0].depth == 3
    assert node.model.pair[0].width == 4


def test_setting_an_attribute_sets_the_key():
    """Setting an attribute sets the key, and a dict that is set becomes a ConfigDict."""
    node = ConfigDict()
    node.model = {"depth": 3}
    assert node["model"].depth == 3
    node["model"]["depth"] = 4
    assert node.model.depth == 4


@pytest.mark.parametrize("how", ["del item", "del attribute", "pop", "clear", "popitem"])
def test_a_removed_key_is_gone_as_attribute_too(how):
    """However a key is removed, the attribute goes with it."""
    node = ConfigDict(depth=3)
    match how:
        case "del item":
            del node["depth"]
        case "del attribute":
            del node.depth
        case "pop":
            assert node.pop("depth") == 3
        case "clear":
            node.clear()
        case "popitem":
            assert node.popitem() == ("depth", 3)
    assert not hasattr(node, "depth")
    assert node == {}


@pytest.mark.parametrize("how", ["update", "ior", "setdefault", "merge"])
def test_every_way_to_put_a_dict_in_converts_it(how):
    """A dict that is put in by update, |=, setdefault or merge becomes a ConfigDict and an attribute."""
    node = ConfigDict()
    match how:
        case "update":
            node.update({"a": {"b": 1}})
        case "ior":
            node |= {"a": {"b": 1}}
        case "setdefault":
            node.setdefault("a", {"b": 1})
        case "merge":
            node.merge({"a": {"b": 1}})
    assert node.a.b == 1
    assert isinstance(node.a, ConfigDict)


def test_or_leaves_both_sides_as_they_were():
    """``|`` gives a new dict, from either side."""
    left = ConfigDict(a=1)
    assert left | {"b": 2} == {"a": 1, "b": 2}
    assert {"a": 0, "c": 3} | left == {"a": 1, "c": 3}
    assert left == {"a": 1}


def test_a_key_with_the_name_of_a_method_is_an_item():
    """A key called ``items`` is read as an item; the method stays."""
    node = ConfigDict(items=3, depth=1)
    assert node["items"] == 3
    assert list(node.items()) == [("items", 3), ("depth", 1)]


def test_a_missing_key_is_an_attribute_error_and_a_key_error_with_the_nearest_name():
    """Reading a key that is not there says which one is near, whichever way it was read."""
    node = ConfigDict(depth=3)
    with pytest.raises(AttributeError, match=r"no key 'dept'\. Did you mean 'depth'"):
        _ = node.dept
    with pytest.raises(KeyError, match="Did you mean 'depth'"):
        _ = node["dept"]
    assert node.get("dept") is None


def test_merge_goes_into_nested_dicts():
    """``merge`` lays keys over nested dicts; ``_delete_`` replaces one."""
    node = ConfigDict(a={"x": 1, "y": 2}, b={"x": 1})
    node.merge({"a": {"y": 3}, "b": {"_delete_": True, "z": 4}})
    assert node == {"a": {"x": 1, "y": 3}, "b": {"z": 4}}
    assert node.a.y == 3


def test_a_copy_shares_nested_dicts_and_a_deep_copy_does_not():
    """Copy is shallow, deepcopy is not, and both are ConfigDicts."""
    node = ConfigDict(a={"x": 1})
    shallow, deep = copy.copy(node), copy.deepcopy(node)
    node.a.x = 2
    assert shallow.a.x == 2
    assert deep.a.x == 1


def test_pickling_keeps_attributes_and_places():
    """A pickled configuration reads the same and still knows its lines."""
    config = pickle.loads(pickle.dumps(Config.fromstring("model = dict(\n    depth=3)\n", ".py")))
    assert config.model.depth == 3
    assert str(config.where("model.depth")) == "<string>:2"


def test_to_dict_gives_plain_containers():
    """to_dict has no ConfigDict in it, and changing it does not change the configuration."""
    node = ConfigDict(a=[{"x": 1}])
    plain = node.to_dict()
    assert type(plain) is dict
    assert type(plain["a"][0]) is dict
    plain["a"][0]["x"] = 2
    assert node.a[0].x == 1


def test_unpacking_gives_the_values():
    """``**`` and ``dict()`` read a ConfigDict like any mapping."""
    node = ConfigDict(a=1, b={"c": 2})
    assert dict(**node) == {"a": 1, "b": {"c": 2}}
    assert dict(node) == {"a": 1, "b": {"c": 2}}
