"""Read files that ``torch.save`` wrote without executing anything from them.

Three steps, each a file: the zip form (:mod:`archive`), what its pickle says (:mod:`machine`), and the values of what is
asked for (:mod:`values`).
"""

from stratagem.checkpoint.restricted_unpickler.archive import TorchArchive
from stratagem.checkpoint.restricted_unpickler.pickle_vm import read_pickle
from stratagem.checkpoint.restricted_unpickler.pickled_objects import PersistentId, PickledGlobal, PickledObject
from stratagem.checkpoint.restricted_unpickler.values import (
    UnsupportedObjectError,
    ValueBuilder,
    is_tensor,
    mapping_items,
    printable,
)

__all__ = [
    "PickledGlobal",
    "UnsupportedObjectError",
    "PersistentId",
    "PickledObject",
    "TorchArchive",
    "ValueBuilder",
    "is_tensor",
    "mapping_items",
    "printable",
    "read_pickle",
]
