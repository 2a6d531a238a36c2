"""State of a run as files, and back."""

from stratagem.checkpoint.api import load_checkpoint, model_part, save_checkpoint
from stratagem.checkpoint.directory import DirectoryFormat
from stratagem.checkpoint.find import Candidate, find_latest_checkpoint, list_checkpoints
from stratagem.checkpoint.formats import CheckpointFormat, format_for
from stratagem.checkpoint.gather import gather_tree
from stratagem.checkpoint.load import DEFAULT_REVISE_KEYS, LoadReport, load_state_dict, weights_to_cpu
from stratagem.checkpoint.manifest import read_manifest
from stratagem.checkpoint.names import bare_name, optimizer_by_index, optimizer_by_name, parameter_names
from stratagem.checkpoint.remote import latest_remote, save_remote
from stratagem.checkpoint.single_file import SingleFileFormat
from stratagem.checkpoint.sources import CheckpointLoader, read_any
from stratagem.checkpoint.tree import StateTree, join_tree, split_tree
from stratagem.checkpoint.verify import verify_checkpoint

__all__ = [
    "DEFAULT_REVISE_KEYS",
    "Candidate",
    "CheckpointFormat",
    "CheckpointLoader",
    "DirectoryFormat",
    "LoadReport",
    "SingleFileFormat",
    "StateTree",
    "bare_name",
    "find_latest_checkpoint",
    "format_for",
    "gather_tree",
    "join_tree",
    "latest_remote",
    "list_checkpoints",
    "load_checkpoint",
    "load_state_dict",
    "model_part",
    "optimizer_by_index",
    "optimizer_by_name",
    "parameter_names",
    "read_any",
    "read_manifest",
    "save_checkpoint",
    "save_remote",
    "split_tree",
    "verify_checkpoint",
    "weights_to_cpu",
]
