"""The visualizer draws on images, and its back ends store what a run produces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stratagem.compat.mmengine.registry import VISBACKENDS
from stratagem.compat.mmengine.visualization import Visualizer
from stratagem.compat.mmengine.visualization.utils import convert_overlay_heatmap, resize_image
from stratagem.compat.mmengine.visualization.vis_backend import LocalVisBackend, TensorboardVisBackend

SIZE = (40, 60)


def gray() -> Any:
    return np.full((*SIZE, 3), 128, dtype=np.uint8)


def test_a_filled_box_colors_its_pixels() -> None:
    """The pixels in the box are red, and the others keep their color."""
    drawn = Visualizer("box", image=gray()).draw_bboxes(
        np.array([10, 5, 30, 25]), edge_colors="r", face_colors="r", alpha=1.0
    )
    image = drawn.get_image()
    assert image.shape == (*SIZE, 3)
    assert image[15, 20].tolist() == [255, 0, 0]
    assert image[35, 50].tolist() == [128, 128, 128]


def test_a_mask_is_blended_by_its_opacity() -> None:
    """With ``alphas=0.5``, green and gray (128) become (64, 192, 64)."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[:20] = True
    image = Visualizer("mask", image=gray()).draw_binary_masks(mask, colors=(0, 255, 0), alphas=0.5).get_image()
    assert image[5, 5].tolist() == [64, 192, 64]
    assert image[30, 5].tolist() == [128, 128, 128]


def test_shapes_outside_the_image_warn() -> None:
    """A box that ends outside the image is drawn with a warning that has the size of the image."""
    with pytest.warns(UserWarning, match="60 x 40"):
        Visualizer("outside", image=gray()).draw_bboxes(np.array([10, 5, 70, 25]))


def test_heat_maps_go_from_blue_to_red() -> None:
    """The smallest value is dark blue, the middle green, and the largest dark red."""
    heat = convert_overlay_heatmap(np.array([[0.0, 1.0, 2.0]]))
    assert heat.tolist() == [[[0, 0, 128], [128, 255, 128], [128, 0, 0]]]


def test_images_are_resized_bilinearly() -> None:
    """Pixel centers are at half coordinates: 0 and 100 become 0, 25, 75 and 100."""
    image = np.array([[0, 100]], dtype=np.uint8)
    assert resize_image(image, (1, 4)).tolist() == [[0, 25, 75, 100]]


def test_local_files_have_the_layout_of_mmengine(tmp_path: Path) -> None:
    """Scalars are lines of JSON in two files, and images are PNG files with the same pixels."""
    visualizer = Visualizer("local", vis_backends=[{"type": "LocalVisBackend"}], save_dir=str(tmp_path))
    visualizer.add_scalars({"loss": 0.5}, step=3, file_path="run.json")
    visualizer.add_image("sample/a", gray(), step=3)
    folder = tmp_path / "vis_data"
    lines = [(folder / name).read_text(encoding="utf-8") for name in ("scalars.json", "run.json")]
    assert [json.loads(line) for line in lines] == [{"loss": 0.5, "step": 3}] * 2
    stored = pytest.importorskip("PIL.Image").open(folder / "vis_image" / "sample" / "a_3.png")
    assert np.array_equal(np.asarray(stored), gray())


def test_tensorboard_files_contain_scalars_of_a_killed_run(tmp_path: Path) -> None:
    """What was added is in the file without closing the store."""
    backend = TensorboardVisBackend(str(tmp_path))
    backend.add_scalars({"loss": 0.25}, step=7)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.25)]
    backend.close()


@pytest.mark.parametrize("name", ["AimVisBackend", "ClearMLVisBackend", "DVCLiveVisBackend", "NeptuneVisBackend"])
def test_unsupported_back_ends_state_what_to_use(name: str) -> None:
    """They can be named in a config, and are refused when they are built."""
    with pytest.raises(NotImplementedError, match=f"{name} is not supported. Use LocalVisBackend"):
        VISBACKENDS.build({"type": name})


def test_two_back_ends_with_one_name_are_refused(tmp_path: Path) -> None:
    """The error has the name."""
    with pytest.raises(RuntimeError, match="LocalVisBackend"):
        Visualizer("twice", vis_backends=[LocalVisBackend(str(tmp_path)), LocalVisBackend(str(tmp_path))])


@pytest.mark.slow
def test_a_visualizer_that_draws_nothing_does_not_load_matplotlib() -> None:
    """A run that only stores scalars needs no plotting library."""
    source = (
        "import sys\n"
        "from stratagem.compat.mmengine.visualization import Visualizer\n"
        "Visualizer('plain').add_scalar('loss', 1.0)\n"
        "print('matplotlib' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "False\n", done.stderr
