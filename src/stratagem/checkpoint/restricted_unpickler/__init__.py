"""Read files that ``torch.save`` wrote without executing anything from them.

Three steps, each a file: the zip form (:mod:`archive`), what its pickle says (:mod:`machine`), and the values of what is
asked for (:mod:`values`).
"""

from stratagem.checkpoint.restricted_unpickler.archive import TorchArchive
from stratagem.checkpoint.restricted_unpickler.pickle_vm import read_pickle
from stratagem.checkpoint.restricted_unpickler.records import Name, Persistent, Record
from stratagem.checkpoint.restricted_unpickler.values import ObjectError, Values, is_tensor, mapping_items, printable

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
