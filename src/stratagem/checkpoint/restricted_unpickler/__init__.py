"""Read files written by ``torch.save`` without executing code from them.

Reading takes three steps: open the zip archive (:mod:`archive`), interpret its pickle (:mod:`pickle_vm`), and build the
requested values (:mod:`values`).
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
