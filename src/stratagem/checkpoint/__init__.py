"""State of a run as files, and back."""

from stratagem.checkpoint.api import load_checkpoint, model_part, save_checkpoint, write_at
from stratagem.checkpoint.background import BackgroundSaver
from stratagem.checkpoint.catalog.find import find_latest_checkpoint, list_checkpoints
from stratagem.checkpoint.catalog.inspection import Candidate, inspect_checkpoint
from stratagem.checkpoint.catalog.order import SAVE_ORDER, SaveOrder
from stratagem.checkpoint.catalog.pointer import note_folder, point_to
from stratagem.checkpoint.catalog.retention import Retention, remove_checkpoints
from stratagem.checkpoint.catalog.retention_tag import Purpose
from stratagem.checkpoint.catalog.saved import Saved, saved_by, saved_in
from stratagem.checkpoint.directory.box_io import digest_of_tensor
from stratagem.checkpoint.directory.directory import DirectoryFormat
from stratagem.checkpoint.directory.manifest import read_manifest
from stratagem.checkpoint.directory.staged_state import Captured
from stratagem.checkpoint.directory.verify import verify_checkpoint
from stratagem.checkpoint.formats.choice import CheckpointFormat, format_for
from stratagem.checkpoint.formats.release import release_checkpoint
from stratagem.checkpoint.formats.single_file import SingleFileFormat
from stratagem.checkpoint.remote.checkpoint_urls import latest_remote, save_orders_at, save_remote
from stratagem.checkpoint.remote.sources import CheckpointLoader, read_any
from stratagem.checkpoint.tree.boxes import Region, boxes
from stratagem.checkpoint.tree.flatten import StateTree, join_tree, split_tree
from stratagem.checkpoint.tree.gather import gather_tree
from stratagem.checkpoint.tree.load import DEFAULT_REVISE_KEYS, LoadReport, fit_state, load_state_dict, weights_to_cpu
from stratagem.checkpoint.tree.names import (
    AVERAGE_PART,
    bare_name,
    optimizer_by_index,
    optimizer_by_name,
    parameter_names,
)
from stratagem.checkpoint.tree.sharded_tensor_state import Pieces, take_box, take_range

__all__ = [
    "AVERAGE_PART",
    "DEFAULT_REVISE_KEYS",
    "BackgroundSaver",
    "Candidate",
    "Captured",
    "CheckpointFormat",
    "CheckpointLoader",
    "DirectoryFormat",
    "LoadReport",
    "Pieces",
    "Purpose",
    "Region",
    "Retention",
    "SAVE_ORDER",
    "SaveOrder",
    "Saved",
    "SingleFileFormat",
    "StateTree",
    "bare_name",
    "boxes",
    "digest_of_tensor",
    "find_latest_checkpoint",
    "fit_state",
    "format_for",
    "gather_tree",
    "inspect_checkpoint",
    "join_tree",
    "latest_remote",
    "list_checkpoints",
    "load_checkpoint",
    "load_state_dict",
    "model_part",
    "note_folder",
    "optimizer_by_index",
    "optimizer_by_name",
    "parameter_names",
    "point_to",
    "read_any",
    "read_manifest",
    "release_checkpoint",
    "remove_checkpoints",
    "save_checkpoint",
    "save_orders_at",
    "saved_by",
    "saved_in",
    "save_remote",
    "split_tree",
    "take_box",
    "take_range",
    "verify_checkpoint",
    "weights_to_cpu",
    "write_at",
]
