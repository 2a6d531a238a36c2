"""Draw on images, and pass images, scalars and configs of a run to the stores."""

from __future__ import annotations

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.dist import master_only
from stratagem.compat.mmengine.registry import VISBACKENDS, VISUALIZERS
from stratagem.compat.mmengine.utils import ManagerMixin, is_seq_of
from stratagem.compat.mmengine.visualization.canvas import DrawingCanvas
from stratagem.compat.mmengine.visualization.feature_maps import draw_feature_map
from stratagem.compat.mmengine.visualization.utils import wait_continue
from stratagem.compat.mmengine.visualization.vis_backend import BaseVisBackend
from stratagem.errors import ConfigTypeError, ConfigValueError, StratagemError
from stratagem.utils import import_module

__all__ = ["Visualizer"]

_PLOT = "plot"
_FRAMELESS = {"frameon": False}


class DuplicateBackendError(StratagemError, RuntimeError):
    """Two stores of a visualizer have the same name."""


@VISUALIZERS.register_module()
class Visualizer(ManagerMixin, DrawingCanvas):
    """Draw on an image with matplotlib, and pass what a run produces to stores. Needs ``pip install stratagem[plot]`` to draw.

    The methods that draw return the visualizer, so that calls can be chained. They do nothing on ranks other than 0, and return
    None there. Coordinates are pixels, from the upper left corner; colors are names of matplotlib or RGB tuples with values from
    0 to 255. An argument of several shapes, such as a color, can be one value for all of them or a list.

    Args:
        name: the name of the instance.
        image: the RGB image to draw on, of shape (H, W, 3).
        vis_backends: the stores, or their configs. ``name`` in a config is the name of the store, by default that of its class.
        save_dir: the folder in which the folder ``vis_data`` receives the files of the stores. Stores that need a folder are
            left out without one.
        fig_save_cfg: arguments of the figure for images that are saved.
        fig_show_cfg: arguments of the figure for images that are shown.

    Raises:
        TypeError: if ``vis_backends`` contains something else.
        RuntimeError: if two stores have the same name.
    """

    def __init__(
        self,
        name: str = "visualizer",
        image: npt.NDArray[Any] | None = None,
        vis_backends: Any = None,
        save_dir: str | None = None,
        fig_save_cfg: dict[str, Any] = _FRAMELESS,
        fig_show_cfg: dict[str, Any] = _FRAMELESS,
    ) -> None:
        ManagerMixin.__init__(self, name)
        DrawingCanvas.__init__(self, fig_save_cfg)
        self._dataset_meta: dict[str, Any] | None = None
        self._vis_backends: dict[str, Any] = {}
        is_single = isinstance(vis_backends, dict | BaseVisBackend) or _is_backend(vis_backends)
        self._add_backends([vis_backends] if is_single else vis_backends or [], save_dir)
        self.fig_show_cfg = fig_show_cfg
        if image is not None:
            self.set_image(image)

    def _add_backends(self, backends: Any, save_dir: str | None) -> None:
        if not (is_seq_of(backends, dict) or all(isinstance(each, dict) or _is_backend(each) for each in backends)):
            raise ConfigTypeError(f"vis_backends must be a list of dicts or of vis backends, got {backends!r}.")
        folder = None if save_dir is None else str(Path(save_dir, "vis_data"))
        for each in backends:
            name, backend = None, each
            if isinstance(each, dict):
                options = {"save_dir": folder, **each}
                name = options.pop("name", None)
                backend = VISBACKENDS.build(options)
            name = name or type(backend).__name__
            if _needs_folder(backend) and getattr(backend, "_save_dir", None) is None:
                warnings.warn(f"The vis backend {name} needs a folder and is left out. Set save_dir.", stacklevel=4)
                continue
            if name in self._vis_backends:
                raise DuplicateBackendError(
                    f"Two vis backends have the name {name!r}. Give one of them another `name` in its config."
                )
            self._vis_backends[name] = backend

    @property
    def dataset_meta(self) -> dict[str, Any] | None:
        """The meta information of the dataset, such as the names of the classes."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict[str, Any] | None) -> None:
        self._dataset_meta = dataset_meta

    @master_only
    def show(
        self,
        drawn_img: npt.NDArray[Any] | None = None,
        win_name: str = "image",
        wait_time: float = 0.0,
        continue_key: str = " ",
        backend: str = "matplotlib",
    ) -> Any:
        """Show an image in a window.

        Args:
            drawn_img: the image; by default what was drawn.
            win_name: the title of the window.
            wait_time: how long to wait for a key, in seconds; 0 for no limit.
            continue_key: the key.
            backend: ``"matplotlib"``; or ``"cv2"``, which needs OpenCV and, as in MMEngine, expects BGR images.

        Returns:
            the figure in a notebook; otherwise None.

        Raises:
            ValueError: if the backend is unknown.
        """
        if backend not in ("matplotlib", "cv2"):
            raise ConfigValueError(f'backend should be "matplotlib" or "cv2", but got {backend!r}.')
        image = self._drawn_image() if drawn_img is None else drawn_img
        if backend == "cv2":
            self._show_with_opencv(image, win_name, wait_time)
            return None
        self._init_manager(win_name)
        figure = self.manager.canvas.figure
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
        figure.clear()
        axes = figure.add_subplot()
        axes.axis(False)
        axes.imshow(image)
        self.manager.canvas.draw()
        if "inline" in import_module("matplotlib.pyplot", extra=_PLOT).get_backend():
            return figure
        wait_continue(figure, timeout=wait_time, continue_key=continue_key)
        return None

    def _show_with_opencv(self, image: npt.NDArray[Any], title: str, wait_time: float) -> None:
        cv2 = import_module("cv2")
        window = str(id(self))
        cv2.namedWindow(winname=window)
        cv2.setWindowTitle(window, title)
        cv2.imshow(window, image)
        cv2.waitKey(math.ceil(wait_time * 1000))

    def _init_manager(self, win_name: str) -> None:
        """Open a window, or use the one that is open."""
        if not hasattr(self, "manager"):
            self.manager = self._open_window()
        try:
            self.manager.set_window_title(win_name)
        except Exception:  # noqa: BLE001 -- toolkits raise errors of different types after the user has closed the window
            self.manager = self._open_window()
            self.manager.set_window_title(win_name)

    def _open_window(self) -> Any:
        figure_class = import_module("matplotlib.figure", extra=_PLOT).Figure
        pyplot = import_module("matplotlib.pyplot", extra=_PLOT)
        return pyplot.new_figure_manager(num=1, FigureClass=figure_class, **self.fig_show_cfg)

    @master_only
    def get_backend(self, name: str) -> Any:
        """Return the store with a name; None if there is none."""
        return self._vis_backends.get(name)

    @staticmethod
    @master_only
    def draw_featmap(
        featmap: torch.Tensor,
        overlaid_image: npt.NDArray[Any] | None = None,
        channel_reduction: str | None = "squeeze_mean",
        topk: int = 20,
        arrangement: tuple[int, int] = (4, 5),
        resize_shape: tuple[int, int] | None = None,
        alpha: float = 0.5,
    ) -> npt.NDArray[np.uint8]:
        """Return a feature map as an RGB image.

        Args:
            featmap: the feature map, of shape (C, H, W).
            overlaid_image: an image that it is laid over; the feature map is interpolated to its size.
            channel_reduction: ``"squeeze_mean"`` for the mean of the channels, ``"select_max"`` for the channel with the largest
                sum, or None for several channels.
            topk: the number of channels to show, those with the largest sums; 0 or less to show the one or three channels that
                there are as one image.
            arrangement: the numbers of rows and columns of the channels.
            resize_shape: the height and width of the result.
            alpha: the weight of the feature map over the image.

        Raises:
            AssertionError: if an argument is invalid.
        """
        return draw_feature_map(featmap, overlaid_image, channel_reduction, topk, arrangement, resize_shape, alpha)

    @master_only
    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Store the config."""
        for backend in self._vis_backends.values():
            backend.add_config(config, **kwargs)

    @master_only
    def add_graph(self, model: nn.Module, data_batch: Any, **kwargs: Any) -> None:
        """Store the structure of the model."""
        for backend in self._vis_backends.values():
            backend.add_graph(model, data_batch, **kwargs)

    @master_only
    def add_image(self, name: str, image: npt.NDArray[Any], step: int = 0) -> None:
        """Store an RGB image."""
        for backend in self._vis_backends.values():
            backend.add_image(name, image, step)

    @master_only
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """Store a number."""
        for backend in self._vis_backends.values():
            backend.add_scalar(name, value, step, **kwargs)

    @master_only
    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        """Store numbers by name; stores that write files also write them to ``file_path``."""
        for backend in self._vis_backends.values():
            backend.add_scalars(scalar_dict, step, file_path, **kwargs)

    @master_only
    def add_datasample(
        self,
        name: str,
        image: npt.NDArray[Any],
        data_sample: Any = None,
        draw_gt: bool = True,
        draw_pred: bool = True,
        show: bool = False,
        wait_time: int = 0,
        step: int = 0,
    ) -> None:
        """Draw a sample and its prediction; subclasses implement this, since it depends on the task."""

    def close(self) -> None:
        """Close the stores."""
        for backend in self._vis_backends.values():
            backend.close()

    @classmethod
    def get_instance(cls, name: str, **kwargs: Any) -> Any:
        """Return the instance with a name; create it if there is none.

        Instances of subclasses are instances of ``Visualizer`` as well: ``Visualizer.get_current_instance()`` returns them.
        """
        instance = super().get_instance(name, **kwargs)
        Visualizer._instance_dict[name] = instance
        return instance


def _is_backend(value: Any) -> bool:
    """Return whether an object is a store: an instance of a registered class, or of a subclass of the base class."""
    return isinstance(value, BaseVisBackend) or type(value) in VISBACKENDS.module_dict.values()


def _needs_folder(backend: Any) -> bool:
    parameter = inspect.signature(type(backend).__init__).parameters.get("save_dir")
    return parameter is not None and parameter.default is parameter.empty
