# ruff: noqa: E501 -- error messages are not wrapped
import pytest

from stratagem.config import Config, Section, check, require
from stratagem.errors import ConfigKeyError
from stratagem.registry import DATASETS, FUNCTIONS, METRICS, MODELS, OPTIMIZERS, Registry

THINGS = Registry("thing", scope="check_things")
LOOPS = Registry("loop", scope="check_loops")


@THINGS.register_module()
class Backbone:
    def __init__(self, depth, width=8, **kwargs):
        self.options = (depth, width, kwargs.pop("norm", None))
        if kwargs:
            raise TypeError(f"unexpected {kwargs}")


@THINGS.register_module()
class Net:
    def __init__(self, backbone, head=None, transforms=()):
        self.backbone = backbone


@THINGS.register_module()
class BigNet(Net):
    def __init__(self, scale=1, **kwargs):
        super().__init__(**kwargs)


@LOOPS.register_module()
class EpochLoop:
    def __init__(self, runner, max_epochs, val_interval=1):
        self.max_epochs = max_epochs


@LOOPS.register_module()
class IterLoop:
    def __init__(self, runner, max_iters, val_interval=1000):
        self.max_iters = max_iters


def train_loop(value):
    """Choose the loop from the given keys, as the engine does."""
    by_epoch = value.get("by_epoch", True)
    return Section(
        registry=LOOPS,
        default_type="EpochLoop" if by_epoch else "IterLoop",
        supplied=frozenset({"runner"}),
        keys={"by_epoch": Section()},
    )


LOADER = Section(
    target="torch.utils.data:DataLoader",
    supplied=frozenset({"dataset"}),
    keys={"dataset": Section(registry=DATASETS), "collate_fn": Section(registry=FUNCTIONS, partial=True)},
)
SECTIONS = {
    "model": Section(registry=THINGS),
    "work_dir": Section(),
    "load_from": Section(),
    "resume": Section(),
    "param_scheduler": Section(),
    "train_dataloader": LOADER,
    "train_cfg": train_loop,
    "val_evaluator": Section(registry=METRICS),
    "default_hooks": Section(keys={"checkpoint": Section(), "logger": Section()}),
    "optim_wrapper": Section(
        keys={
            "type": Section(registry=THINGS, by_name=True),
            "optimizer": Section(registry=OPTIMIZERS, supplied=frozenset({"params"})),
            "clip_grad": Section(target="torch.nn.utils:clip_grad_norm_", supplied=frozenset({"parameters"})),
            "accumulative_counts": Section(),
        }
    ),
}


def problems(text):
    """Check a Python configuration and return its problems as strings."""
    return [str(problem) for problem in check(Config.fromstring(text, ".py"), SECTIONS)]


def test_a_valid_config_has_no_problems():
    """A valid configuration has no problems, including free-form values and keys that are read while loading."""
    assert not problems(
        "custom_imports = dict(imports=[])\nvars = dict(anything=dict(goes=1))\nwork_dir = 'x'\n"
        "model = dict(type='BigNet', scale=2, backbone=dict(type='Backbone', depth=3, norm='bn'),\n"
        "             head=[dict(type='unknown to us', whatever=1)])\n"
        "train_cfg = dict(by_epoch=False, max_iters=3)\ntrain_dataloader = dict(batch_size=2, num_workers=0)\n"
        "val_evaluator = [dict(type='Accuracy', task='multiclass', num_classes=3)]\n"
        "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1), clip_grad=dict(max_norm=1.0))\n"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("load_form = 'x'", "load_form (<string>:1): unknown key 'load_form'. Did you mean 'load_from'?"),
        ("model = dict(type='Ned', backbone=1)", "model.type (<string>:1): 'Ned' is not in the thing registry. Did you mean 'Net'"),
        ("model = dict(typ='Net')", "model (<string>:1): the key 'type', which names a thing, is missing. Is 'typ' a typo?"),
        ("model = dict(type='Net', backbone=1,\n  haed=2)", "model.haed (<string>:2): Net takes no argument 'haed'. Did you mean 'head'?"),
        ("model = dict(type='Net')", "model (<string>:1): Net is missing required arguments: 'backbone'."),
        ("model = dict(type='BigNet', backbone=1, sclae=2)", "model.sclae (<string>:1): BigNet takes no argument 'sclae'. Did you mean 'scale'?"),
        ("model = dict(type='BigNet', backbone=1, haed=2)", "model.haed (<string>:1): BigNet takes no argument 'haed'. Did you mean 'head'?"),
        ("model = dict(type='Net', backbone=dict(type='Backbone', depht=3))", "model.backbone.depht (<string>:1): Backbone takes no argument 'depht'. Did you mean 'depth'?"),
        ("model = dict(type='Net', backbone=dict(type='Backbone', depth=3, nrom=3))", "model.backbone.nrom (<string>:1): Backbone takes no argument 'nrom'. Did you mean 'norm'?"),
        ("train_cfg = dict(max_epoch=3)", "train_cfg.max_epoch (<string>:1): EpochLoop takes no argument 'max_epoch'. Did you mean 'max_epochs'"),
        ("train_cfg = dict(max_epochs=3, by_epochs=False)", "train_cfg.by_epochs (<string>:1): EpochLoop takes no argument 'by_epochs'. Did you mean 'by_epoch'"),
        ("train_dataloader = dict(batchsize=3)", "train_dataloader.batchsize (<string>:1): DataLoader takes no argument 'batchsize'. Did you mean 'batch_size'"),
        ("train_dataloader = dict(collate_fn=dict(type='default_colate'))", "'default_colate' is not in the function registry. Did you mean 'default_collate'"),
        ("default_hooks = dict(chekpoint=dict(interval=1))", "default_hooks.chekpoint (<string>:1): unknown key 'chekpoint'. Did you mean 'checkpoint'?"),
        ("optim_wrapper = dict(optimizer=dict(type='SGD', momentun=0.9))", "optim_wrapper.optimizer.momentun (<string>:1): SGD takes no argument 'momentun'. Did you mean 'momentum'?"),
        ("optim_wrapper = dict(optimizer=dict(type='SDG'))", "'SDG' is not in the optimizer registry. Did you mean 'SGD'"),
        ("optim_wrapper = dict(type='Nett')", "'Nett' is not in the thing registry. Did you mean 'Net'"),
        ("optim_wrapper = dict(clip_grad=dict(maxnorm=1))", "clip_grad_norm_ takes no argument 'maxnorm'. Did you mean 'max_norm'"),
        ("val_evaluator = [dict(type='Acuracy')]", "val_evaluator.0.type (<string>:1): 'Acuracy' is not in the metric registry. Did you mean 'Accuracy'"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_with_its_location_and_the_closest_name(text, problem):
    """Each problem reports its location, the mistake and the closest valid name."""
    found = problems(text)
    assert problem in found[0]


def test_all_problems_are_reported_at_once_in_file_order():
    """All problems of a file are reported in one error, in the order of the file."""
    config = Config.fromstring("wrok_dir = 'x'\nmodel = dict(type='Net', bakbone=1)\nrezume = True\n", ".py")
    with pytest.raises(ConfigKeyError) as caught:
        require(config, SECTIONS)
    lines = str(caught.value).splitlines()
    assert lines[0] == "The configuration has 4 problems:"
    assert [line.split()[0] for line in lines[1:]] == ["wrok_dir", "model.bakbone", "model", "rezume"]


def test_a_misspelled_override_is_reported():
    """A misspelled ``--set`` key is rejected like a key in a file."""
    config = Config.fromstring("train_cfg = dict(max_epochs=1)", ".py")
    config.merge_from_dict({"train_cfg.val_intervall": 2})
    assert str(check(config, SECTIONS)[0]) == (
        "train_cfg.val_intervall (--set train_cfg.val_intervall): EpochLoop takes no argument 'val_intervall'. "
        "Did you mean 'val_interval'?"
    )


def test_a_dotted_path_in_a_data_file_is_a_problem_at_any_depth():
    """A dotted path in a data file is reported before anything is built, even in nested arguments."""
    config = Config.fromstring("model: {type: Net, backbone: {x: [{type: os.system, command: x}]}}\n", ".yaml")
    found = [str(problem) for problem in check(config, SECTIONS)]
    assert len(found) == 1
    assert found[0].startswith("model.backbone.x.0.type (<string>:1): A data file names 'os.system'")


def test_a_missing_library_is_a_problem():
    """A model of a library that is not installed is reported before training, with the install command."""
    config = Config.fromstring("model = dict(type='timm.resnet18')\n", ".py")
    found = [str(problem) for problem in check(config, {"model": Section(registry=MODELS)})]
    assert not found or "pip install timm" in found[0]


def test_arbitrary_keys_can_be_allowed():
    """``others`` accepts any key and checks the values below it."""
    rule = Section(others=Section(registry=OPTIMIZERS, supplied=frozenset({"params"})))
    config = Config({"optim": {"generator": {"type": "SGD"}, "critic": {"type": "SGD", "rl": 1}}})
    assert [problem.path for problem in check(config, {"optim": rule})] == ["optim.critic.rl"]


FULL = """
work_dir = 'runs'
load_from = None
resume = False
param_scheduler = []
model = dict(type='BigNet', scale=2, backbone=dict(type='Backbone', depth=3, width=4, norm='bn'), head=None,
             transforms=[dict(type='Net', backbone=1), dict(type='Net', backbone=2, head=3)])
custom_imports = dict(imports=[], allow_failed_imports=False)
train_dataloader = dict(batch_size=2, num_workers=0, shuffle=True, drop_last=False, pin_memory=False, timeout=0,
                        persistent_workers=False, prefetch_factor=None, collate_fn=dict(type='default_collate'))
train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
val_evaluator = dict(type='Accuracy', task='multiclass', num_classes=3, top_k=1, average='micro', ignore_index=None)
default_hooks = dict(checkpoint=dict(), logger=dict())
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=False, foreach=None),
                     clip_grad=dict(max_norm=1.0, norm_type=2.0, error_if_nonfinite=False), accumulative_counts=2)
"""


def key_paths(node, path=()):
    """Yield the path of every key that is checked."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from key_paths(item, (*path, index))
    elif isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            yield from key_paths(value, (*path, key))


def misspellings(key):
    """Yield the key with each character dropped, each two neighbors swapped, and one character appended."""
    for at in range(len(key)):
        yield key[:at] + key[at + 1 :]
        if key[at : at + 2] != key[at : at + 2][::-1]:
            yield key[:at] + key[at : at + 2][::-1] + key[at + 2 :]
    yield key + "x"
    yield key + "s"


def renamed(node, path, name):
    """Return nested dicts with the last key of a path renamed."""
    key, *rest = path
    if isinstance(node, list):
        return [renamed(item, rest, name) if index == key else item for index, item in enumerate(node)]
    if not rest:
        return {name if item == key else item: value for item, value in node.items()}
    return {item: renamed(value, rest, name) if item == key else value for item, value in node.items()}


@pytest.mark.slow
def test_misspelled_keys_are_rejected_with_the_correct_name():
    """At least 99 % of keys with one character dropped, swapped or appended are rejected with the correct name."""
    full = Config.fromstring(FULL, ".py").to_dict()
    assert not check(Config(full), SECTIONS)
    tried, missed = 0, []
    for path in key_paths(full):
        for name in misspellings(path[-1]):
            tried += 1
            found = [str(problem) for problem in check(Config(renamed(full, path, name)), SECTIONS)]
            if not any(repr(name) in text and repr(path[-1]) in text for text in found):
                missed.append((".".join(path), name, found))
    assert tried > 700
    assert len(missed) <= tried * 0.01, missed
