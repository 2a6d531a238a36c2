"""Read files that ``torch.save`` wrote without executing anything from them.

Three steps, each a file: the zip form (:mod:`archive`), what its pickle says (:mod:`machine`), and the values of what is
asked for (:mod:`values`).
"""

from stratagem.checkpoint.inert.archive import TorchArchive
from stratagem.checkpoint.inert.machine import read_pickle
from stratagem.checkpoint.inert.records import Name, Persistent, Record
from stratagem.checkpoint.inert.values import ObjectError, Values, is_tensor, mapping_items, printable

__all__ = [
    "Name",
    "ObjectError",
    "Persistent",
    "Record",
    "TorchArchive",
    "Values",
    "is_tensor",
    "mapping_items",
    "printable",
    "read_pickle",
]
