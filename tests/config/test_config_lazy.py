import sys

import pytest

from stratagem.config import Config
from stratagem.errors import ConfigParsingError, MissingDependencyError
from stratagem.registry import OPTIMIZERS, Registry


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Create an importable package ``lazylib`` with a class and unload it afterwards."""
    (tmp_path / "lazylib").mkdir()
    (tmp_path / "lazylib" / "__init__.py").write_text(
        "class Net:\n    def __init__(self, depth, act=None):\n        self.depth, self.act = depth, act\n"
        "    class Act: pass\n"
    )
    (tmp_path / "lazylib" / "inner.py").write_text("WIDTH = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazylib"]:
        del sys.modules[name]


NET = "from lazylib import Net\nmodel = dict(type=Net, depth=3, act=Net.Act)\n"


def test_nothing_is_imported_before_it_is_read(library):
    """Loading, copying, dumping and merging import nothing; reading a value imports it."""
    config = Config.fromstring(NET, ".py")
    assert config.pretty_text == "model = dict(type='lazylib.Net', depth=3, act='lazylib.Net.Act')\n"
    assert config.to_dict() == {"model": {"type": "lazylib.Net", "depth": 3, "act": "lazylib.Net.Act"}}
    config.merge_from_dict({"model.depth": 4})
    assert "lazylib" not in sys.modules
    kind = config.model.type
    assert kind is sys.modules["lazylib"].Net
    assert config["model"]["type"] is kind
    assert config.model.get("type") is kind
    assert dict(**config.model)["act"] is kind.Act


def test_a_lazy_class_is_built_with_its_lazy_arguments(library):
    """The registry imports the lazy ``type`` and lazy classes in arguments, including those in lists."""
    config = Config.fromstring(NET.replace("Net.Act)", "[Net.Act])"), ".py")
    net = Registry("net", scope="test").build(config.model)
    assert (net.depth, net.act) == (3, [sys.modules["lazylib"].Net.Act])


def test_a_dumped_lazy_config_builds_the_same(library, tmp_path):
    """The dotted names in a dump resolve to the original classes."""
    path = tmp_path / "dumped.py"
    Config.fromstring(NET, ".py").dump(path)
    net = Registry("net", scope="test").build(Config.fromfile(path).model)
    assert type(net) is sys.modules["lazylib"].Net


def test_modules_and_aliases_are_lazy_too(library):
    """``import a as b``, ``import a`` and ``from a import module`` are lazy."""
    config = Config.fromstring(
        "import lazylib as lib\nimport lazylib\nfrom lazylib import inner\n"
        "x = dict(a=lib.Net, b=lazylib.Net, c=inner.WIDTH)\n",
        ".py",
    )
    assert "lazylib" not in sys.modules
    assert config.x.a is config.x.b
    assert config.to_dict()["x"]["c"] == "lazylib.inner.WIDTH"


@pytest.fixture
def bases(tmp_path):
    """Write a pure-Python base to a sibling folder; return a function that writes and loads a child of it."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.py").write_text(
        "from torch.optim import SGD\nmodel = dict(type='Net', depth=3,\n    width=8)\n"
        "optimizer = dict(type=SGD, lr=0.1)\n"
    )
    (tmp_path / "runs").mkdir()

    def load(text):
        path = tmp_path / "runs" / "run.py"
        path.write_text(
            "from stratagem.config import read_base\n\nwith read_base():\n    from ..shared.base import *\n" + text
        )
        return Config.fromfile(path)

    return load


def test_read_base_imports_the_names_of_a_file(bases):
    """``read_base`` imports the names of a file; later edits are merged over them, and all line numbers are known."""
    config = bases("model.update(depth=5)\noptimizer.lr = 0.2\n")
    assert config.to_dict() == {
        "model": {"type": "Net", "depth": 5, "width": 8},
        "optimizer": {"type": "torch.optim.SGD", "lr": 0.2},
    }
    assert str(config.where("model.depth")).endswith("runs/run.py:5")
    assert str(config.where("model.width")).endswith("shared/base.py:3")
    assert str(config.where("optimizer.lr")).endswith("runs/run.py:6")


def test_assigning_a_name_of_the_base_replaces_it(bases):
    """An assignment replaces the base's dict, as in Python; ``merge`` updates it."""
    assert bases("model = dict(a=1)\n").model == {"a": 1}
    merged = bases("model.merge(dict(head=dict(a=1)))\n").model
    assert merged == {"type": "Net", "depth": 3, "width": 8, "head": {"a": 1}}


def test_a_single_name_of_a_base_can_be_imported(tmp_path):
    """``from .base import name as other`` imports only that name."""
    (tmp_path / "base.py").write_text("a = 1\nb = dict(c=2)\n")
    (tmp_path / "run.py").write_text("with read_base():\n    from .base import b as d\n")
    assert Config.fromfile(tmp_path / "run.py") == {"d": {"c": 2}}


def test_a_key_in_two_pure_python_bases_is_rejected(tmp_path):
    """A key in two pure-Python bases raises an error that names both files and lines."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    (tmp_path / "run.py").write_text("with read_base():\n    from .a import *\n    from .b import *\n")
    with pytest.raises(KeyError, match=r"a.py:1 and .*b.py:1"):
        Config.fromfile(tmp_path / "run.py")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("_base_ = 'a.py'\nwith read_base():\n    from .a import *\n", "both _base_ and read_base"),
        ("with read_base():\n    import a\n", "<string>:2: a read_base"),
        ("from .a import b\n", "<string>:1: a relative import"),
        ("from torch.optim import *\n", "<string>:1: list the names to import"),
        ("import torch\nx = torch.zeros(3)\n", "torch.zeros was called"),
    ],
)
def test_unsupported_statements_in_a_pure_python_config_are_rejected(text, problem):
    """An unsupported statement in a pure-Python configuration raises a RuntimeError with a reason and a line."""
    with pytest.raises(RuntimeError, match=problem):
        Config.fromstring(text, ".py")


def test_a_file_with_base_executes_its_imports(tmp_path):
    """A file with ``_base_`` is an ordinary program whose imports are executed."""
    assert Config.fromstring("_base_ = []\nimport torch\nx = torch.zeros(3).numel()\n", ".py") == {"x": 3}


def test_lazy_import_can_be_set_explicitly(tmp_path):
    """``lazy_import`` overrides the automatic choice between lazy and executed imports."""
    path = tmp_path / "run.py"
    path.write_text("import torch\nx = 1\n")
    assert Config.fromfile(path, lazy_import=False) == {"x": 1}
    path.write_text("import torch\nx = torch.zeros(1)\n")
    with pytest.raises(ConfigParsingError):
        Config.fromfile(path, lazy_import=True)


def test_a_missing_library_is_an_error_when_it_is_used():
    """A class from a missing library raises an error when it is read, not when the file is loaded."""
    config = Config.fromstring("from no_such_library import Net\nmodel = dict(type=Net)\n", ".py")
    with pytest.raises(MissingDependencyError, match="no_such_library"):
        _ = config.model.type


def test_a_module_next_to_the_file_is_found(tmp_path, monkeypatch):
    """A class from a module next to a pure-Python configuration can be imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_lazy.py").write_text("class Net: pass\n")
    (tmp_path / "run.py").write_text("from beside_lazy import Net\nmodel = dict(type=Net)\n")
    assert Config.fromfile(tmp_path / "run.py").model.type.__name__ == "Net"


def test_torch_optimizers_can_be_given_as_classes():
    """``type=SGD`` with the class itself requires no registry entry."""
    import torch

    config = Config.fromstring("from torch.optim import SGD\noptimizer = dict(type=SGD, lr=0.1)\n", ".py")
    weight = torch.nn.Parameter(torch.zeros(1))
    assert OPTIMIZERS.build(config.optimizer, default_args={"params": [weight]}).param_groups[0]["lr"] == 0.1


def test_a_key_of_the_base_can_be_deleted(tmp_path):
    """``del`` removes a key imported by ``read_base``, and a nested edit changes one."""
    (tmp_path / "base.py").write_text("lr = 1\nmodel = dict(depth=3, width=8)\n")
    (tmp_path / "run.py").write_text(
        "from stratagem.config import read_base\n\nwith read_base():\n    from .base import *\n\n"
        "del lr\nmodel.update(dict(depth=5))\n"
    )
    assert Config.fromfile(tmp_path / "run.py").to_dict() == {"model": {"depth": 5, "width": 8}}
