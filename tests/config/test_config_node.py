import copy
import pickle

import pytest

from stratagem.config import Config, ConfigDict


def test_keys_are_attributes_at_every_depth():
    """Nested dicts are accessible as attributes, including those in lists and tuples."""
    node = ConfigDict(model={"stages": [{"depth": 3}], "pair": ({"width": 4},)})
    assert node.model.stages[0].depth == 3
    assert node.model.pair[0].width == 4


def test_setting_an_attribute_sets_the_key():
    """Assigning an attribute sets the key, and an assigned dict becomes a ConfigDict."""
    node = ConfigDict()
    node.model = {"depth": 3}
    assert node["model"].depth == 3
    node["model"]["depth"] = 4
    assert node.model.depth == 4


@pytest.mark.parametrize("how", ["del item", "del attribute", "pop", "clear", "popitem"])
def test_removing_a_key_removes_the_attribute(how):
    """Removing a key in any way also removes the attribute."""
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
def test_inserted_dicts_are_converted(how):
    """A dict that is inserted with update, |=, setdefault or merge becomes a ConfigDict."""
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


def test_or_does_not_modify_its_operands():
    """``|`` returns a new dict and works with a plain dict on either side."""
    left = ConfigDict(a=1)
    assert left | {"b": 2} == {"a": 1, "b": 2}
    assert {"a": 0, "c": 3} | left == {"a": 1, "c": 3}
    assert left == {"a": 1}


def test_a_key_may_have_the_name_of_a_method():
    """A key named ``items`` is accessible as an item, and the method remains available."""
    node = ConfigDict(items=3, depth=1)
    assert node["items"] == 3
    assert list(node.items()) == [("items", 3), ("depth", 1)]


def test_a_missing_key_suggests_the_closest_name():
    """Reading a missing key raises AttributeError or KeyError with the closest name."""
    node = ConfigDict(depth=3)
    with pytest.raises(AttributeError, match=r"no key 'dept'\. Did you mean 'depth'"):
        _ = node.dept
    with pytest.raises(KeyError, match="Did you mean 'depth'"):
        _ = node["dept"]
    assert node.get("dept") is None


def test_merge_updates_nested_dicts():
    """``merge`` updates nested dicts recursively; ``_delete_`` replaces one."""
    node = ConfigDict(a={"x": 1, "y": 2}, b={"x": 1})
    node.merge({"a": {"y": 3}, "b": {"_delete_": True, "z": 4}})
    assert node == {"a": {"x": 1, "y": 3}, "b": {"z": 4}}
    assert node.a.y == 3


def test_a_copy_shares_nested_dicts_and_a_deep_copy_does_not():
    """``copy`` shares nested dicts, and ``deepcopy`` does not."""
    node = ConfigDict(a={"x": 1})
    shallow, deep = copy.copy(node), copy.deepcopy(node)
    node.a.x = 2
    assert shallow.a.x == 2
    assert deep.a.x == 1


def test_pickling_keeps_attributes_and_line_numbers():
    """A pickled configuration keeps its values and their line numbers."""
    config = pickle.loads(pickle.dumps(Config.fromstring("model = dict(\n    depth=3)\n", ".py")))
    assert config.model.depth == 3
    assert str(config.where("model.depth")) == "<string>:2"


def test_to_dict_returns_plain_containers():
    """``to_dict`` contains no ConfigDict, and modifying it does not affect the configuration."""
    node = ConfigDict(a=[{"x": 1}])
    plain = node.to_dict()
    assert type(plain) is dict
    assert type(plain["a"][0]) is dict
    plain["a"][0]["x"] = 2
    assert node.a[0].x == 1


def test_unpacking_returns_the_values():
    """A ConfigDict can be unpacked with ``**`` and converted with ``dict()``."""
    node = ConfigDict(a=1, b={"c": 2})
    assert dict(**node) == {"a": 1, "b": {"c": 2}}
    assert dict(node) == {"a": 1, "b": {"c": 2}}
