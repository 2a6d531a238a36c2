import sys
import warnings

import pytest

from stratagem.errors import ConfigValueError, MissingDependencyError
from stratagem.registry import METRICS, OPTIMIZERS, ClassesOf, ModelZoo, PretrainedFactories, Registry
from stratagem.utils.data_names import DataName

LIBRARY = """
class Model:
    def __init__(self, name="plain", width=1):
        self.name, self.width = name, width

    @classmethod
    def from_pretrained(cls, path):
        return cls(path)

    @classmethod
    def save(cls):
        raise AssertionError

class Other: pass

def create(name, width=1):
    return Model(name, width)

def names():
    return ["small", "large"]
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with two name sources for the models of a library."""
    (tmp_path / "modelhub.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry(
        "model",
        scope="name_sources",
        name_sources=[
            ModelZoo("hub.", "modelhub:create", "modelhub:names"),
            PretrainedFactories("modelhub", ["modelhub:Model"], ["from_pretrained"]),
        ],
    )
    sys.modules.pop("modelhub", None)


def test_a_prefix_selects_the_models_of_a_factory(registry):
    """``hub.small`` calls the library's function with that name, and its arguments are checked."""
    built = registry.build({"type": "hub.small", "width": 3})
    assert (built.name, built.width) == ("small", 3)
    assert {"hub.small", "hub.large"} <= set(registry.names())
    with pytest.raises(TypeError, match=r"takes no argument 'widht'. Did you mean 'width'"):
        registry.build({"type": "hub.small", "widht": 3})


def test_an_unknown_model_is_rejected_with_the_closest_name(registry):
    """A misspelled model name is rejected before anything is built; a suffix for weights is allowed."""
    with pytest.raises(KeyError, match=r"'hub.smal' is not in .*'hub.small'"):
        registry.build({"type": "hub.smal"})
    with pytest.raises(ConfigValueError, match=r"data file .*Did you mean 'hub.small'"):
        registry.build({"type": DataName("hub.smal")})
    assert registry.build({"type": "hub.small.weights_1"}).name == "small.weights_1"


def test_a_library_is_imported_only_when_it_is_needed(registry):
    """Looking up an unrelated name does not import the library."""
    assert registry.get("Linear") is None
    assert "modelhub" not in sys.modules


def test_class_methods_that_build_models_are_names(registry):
    """Model classes and their listed class methods are found; other objects in the library are not."""
    assert registry.build({"type": "modelhub.Model.from_pretrained", "path": "x"}).name == "x"
    assert registry.build({"type": "modelhub.Model"}).name == "plain"
    source = PretrainedFactories("modelhub", ["modelhub:Model"], ["from_pretrained"])
    for name in ("modelhub.Model.save", "modelhub.Other", "modelhub.create", "modelhub._Model", "Model"):
        assert source.find(name) is None


def test_the_classes_of_a_library_are_found_by_prefix(registry):
    """``modelhub.Model`` is found, and the library is imported only for names with its prefix."""
    members = ClassesOf("modelhub", "modelhub:Model", prefix="modelhub.")
    assert members.find("Model") is None
    assert members.names() == ()
    assert "modelhub" not in sys.modules
    assert members.find("modelhub.Model")("x").name == "x"
    assert members.find("modelhub.Other") is None
    assert members.names() == ["modelhub.Model"]


@pytest.mark.parametrize("library", ["schedulefree", "heavyball", "bitsandbytes"])
def test_optimizers_of_a_missing_library_suggest_how_to_install_it(library, monkeypatch):
    """An optimizer from a missing library raises an error with the install command, even for a data file."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.optim", None)
    with pytest.raises(MissingDependencyError, match=f"pip install {library}"):
        OPTIMIZERS.get(DataName(f"{library}.AdamW"))
    assert OPTIMIZERS.get("AdamW").__module__.startswith("torch.optim")


def test_metrics_are_built_without_the_deprecated_aliases_of_torchmetrics():
    """``Perplexity`` is the class of ``torchmetrics.text``; its alias in ``torchmetrics`` warns whenever it is built."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        built = METRICS.build({"type": "Perplexity"})
    assert type(built).__module__ == "torchmetrics.text.perplexity"
