"""The base classes of models and data preprocessors."""

from stratagem.compat.mmengine.model.base_model.base_model import BaseModel
from stratagem.compat.mmengine.model.base_model.data_preprocessor import BaseDataPreprocessor, ImgDataPreprocessor

__all__ = ["BaseDataPreprocessor", "BaseModel", "ImgDataPreprocessor"]
