"""Annotations and predictions of samples."""

from stratagem.compat.mmengine.structures.base_data_element import BaseDataElement
from stratagem.compat.mmengine.structures.instance_data import InstanceData
from stratagem.compat.mmengine.structures.label_data import LabelData
from stratagem.compat.mmengine.structures.pixel_data import PixelData

__all__ = ["BaseDataElement", "InstanceData", "LabelData", "PixelData"]
