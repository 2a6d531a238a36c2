"""Variables of configuration files are told from misspelled keys by what uses them."""

import warnings
from pathlib import Path

import pytest

from stratagem.config import Config, Section, check

SECTIONS = {"model": Section(), "optim_wrapper": Section(), "env_cfg": Section(), "work_dir": Section()}


def load(folder: Path, **files: str) -> Config:
    """Write files and load the last one."""
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text)
    return Config.fromfile(folder / f"{stem}.{suffix}")


def problems(config: Config, scope: str | None = None) -> list[str]:
    return [str(problem) for problem in check(config, SECTIONS, scope=scope)]


@pytest.mark.parametrize(
    "text",
    [
        "width = 3\nmodel = dict(width=width)",
        "width = 3\nhalf = width // 2\nmodel = dict(width=half)",
        "width = 3\nmodel = [width for _ in range(2)]",
        "width = 3\ndef double():\n    return 2 * width\nmodel = dict(width=double())",
        "width = 3\nmodel = dict(width=f'{width}')",
        "model = {}\nfor width in range(3):\n    model[str(width)] = width",
        "model = {}\nfor step in range(3):\n    model[str(step)] = last if step else 0\n    last = step",
        "_width = 3\nmodel = 1",
    ],
)
def test_a_name_that_the_file_uses_is_a_variable(tmp_path: Path, text: str) -> None:
    """A name that the code of its file reads after the assignment is accepted, and so is one with an underscore."""
    assert problems(load(tmp_path, run_py=text)) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run_py", "_base_ = 'base.py'\nmodel = dict(width=_base_.width)"),
        ("run_py", "_base_ = 'base.py'\nmodel = dict(width=_base_['width'])"),
        ("run_py", "_base_ = 'base.py'\nmodel = dict(width=_base_.get('width'))"),
        ("run_py", "_base_ = 'base.py'\nmodel = dict(width={{ _base_.width }})"),
        (
            "run_py",
            "_base_ = 'base.py'\nmodel = f'{{{{ _base_.width }}}} layers'".replace("{{{{", "{{").replace("}}}}", "}}"),
        ),
        (
            "run_py",
            "from stratagem.config import read_base\nwith read_base():\n    from .base import *\nmodel = dict(width=width)",
        ),
        (
            "run_py",
            "from stratagem.config import read_base\nwith read_base():\n  from .base import width as size\nmodel = {'w': size}",
        ),
    ],
)
def test_a_name_that_a_file_based_on_it_uses_is_a_variable(tmp_path: Path, name: str, text: str) -> None:
    """A name that only a dependent file reads is accepted, in each way to read it."""
    assert problems(load(tmp_path, base_py="width = 3\n", **{name: text})) == []


def test_a_name_that_nothing_uses_is_an_error_with_the_nearest_section(tmp_path: Path) -> None:
    """The error names the line, the nearest section and the section for own values."""
    (problem,) = problems(load(tmp_path, run_py="model = 1\noptimizer_wrapper = 2\n"))
    assert problem == (
        f"optimizer_wrapper ({tmp_path}/run.py:2): unknown key 'optimizer_wrapper'. Did you mean 'optim_wrapper'? No other value "
        "in the files uses it. Put values that only your own code uses in the section 'vars'."
    )


def test_a_name_that_is_used_by_a_sibling_only_is_an_error(tmp_path: Path) -> None:
    """A file that reads a name of its own base does not make the same name of another base a variable."""
    config = load(
        tmp_path,
        a_py="depth = 3\n",
        b0_py="width = 4\n",
        b_py="_base_ = 'b0.py'\nmodel = dict(width=_base_.width)\n",
        run_py="_base_ = ['a.py', 'b.py']\n",
    )
    (problem,) = problems(config)
    assert problem.startswith(f"depth ({tmp_path}/a.py:1): unknown key 'depth'.")


@pytest.mark.parametrize("name", ["optim_wraper", "optim_warpper", "optimwrapper", "modell", "env_cgf", "work_dirs"])
def test_a_name_that_resembles_a_section_is_an_error_even_if_something_uses_it(tmp_path: Path, name: str) -> None:
    """A name at most two edits away from a section is refused, also as a variable and under the scope of another project."""
    config = load(tmp_path, run_py=f"{name} = dict(a=1)\nmodel = dict(b={name})\n")
    (problem,) = problems(config, scope="mmdet")
    assert f"unknown key {name!r}. Did you mean" in problem
    assert f"{tmp_path}/run.py:2 uses" in problem


def test_a_listed_name_may_resemble_a_section(tmp_path: Path) -> None:
    """``conv_cfg`` is accepted as a variable although it differs from ``env_cfg`` in two characters."""
    assert problems(load(tmp_path, run_py="conv_cfg = dict(type='Conv')\nmodel = dict(conv_cfg=conv_cfg)\n")) == []


def test_a_variable_that_only_the_base_uses_warns_with_both_lines(tmp_path: Path) -> None:
    """A file that changes a variable after its base used it causes a warning with both lines."""
    config = load(
        tmp_path, base_py="\nwidth = 3\nmodel = dict(width=width)\n", run_py="_base_ = 'base.py'\n\nwidth = 5\n"
    )
    with pytest.warns(UserWarning, match=r"'width' is set in .*run.py:3, but .*base.py:3 uses its value before that"):
        assert problems(config) == []


def test_a_variable_that_is_set_twice_warns_if_only_the_first_value_is_used(tmp_path: Path) -> None:
    """A second assignment without a later use causes a warning."""
    config = load(tmp_path, run_py="width = 3\nmodel = dict(width=width)\nwidth = 4\n")
    with pytest.warns(UserWarning, match=r"'width' is set in .*run.py:3, but .*run.py:2 uses"):
        assert problems(config) == []


def test_an_override_of_a_variable_warns_with_the_line_that_uses_it(tmp_path: Path) -> None:
    """``--set`` of a variable has no effect on the values that depend on it, which a warning states."""
    config = load(tmp_path, run_py="width = 3\nmodel = dict(width=width)\n")
    config.merge_from_dict({"width": 4})
    with pytest.warns(UserWarning, match=r"'width' is set in --set width, but .*run.py:2 uses its value before that"):
        assert problems(config) == []


def test_under_another_scope_a_name_far_from_every_section_warns(tmp_path: Path) -> None:
    """Code of another project may read further keys, so a name that nothing uses causes only a warning there."""
    config = load(tmp_path, run_py="model = 1\nsomething_else = 2\n")
    with pytest.warns(UserWarning, match=r"run.py:2: unknown key 'something_else'"):
        assert problems(config, scope="mmdet") == []
    assert len(problems(config, scope="mmengine")) == 1


def test_a_file_without_mistakes_causes_no_warning(tmp_path: Path) -> None:
    """A variable that is changed and then used again is accepted without a warning."""
    config = load(
        tmp_path,
        base_py="width = 3\nmodel = dict(width=width)\n",
        run_py="_base_ = 'base.py'\nwidth = 5\nmodel = dict(width=width)\n",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert problems(config) == []


def test_a_data_file_can_use_a_variable_of_its_base(tmp_path: Path) -> None:
    """A placeholder in a YAML file makes the name in its base a variable."""
    config = load(
        tmp_path, base_yaml="width: 3\n", run_yaml="_base_: base.yaml\nmodel: {width: '{{ _base_.width }}'}\n"
    )
    assert problems(config) == []
