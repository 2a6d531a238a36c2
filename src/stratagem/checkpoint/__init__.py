"""Save, load, find, verify, convert and delete checkpoints."""

from stratagem.checkpoint.api import get_model_state, load_checkpoint, save_checkpoint, write_to
from stratagem.checkpoint.background import BackgroundSaver
from stratagem.checkpoint.catalog.find import (
    best_checkpoints,
    find_best_checkpoint,
    find_latest_checkpoint,
    list_checkpoints,
    record_checkpoint_folder,
    update_last_checkpoint,
)
from stratagem.checkpoint.catalog.inspection import CheckpointInfo, inspect_checkpoint
from stratagem.checkpoint.catalog.order import SAVE_ORDER, SaveOrder
from stratagem.checkpoint.catalog.retention import Retention, remove_checkpoints
from stratagem.checkpoint.catalog.retention_tag import RetentionTag
from stratagem.checkpoint.catalog.saved_checkpoints import SavedCheckpoint, checkpoints_by_run, checkpoints_of_run
from stratagem.checkpoint.directory.box_io import digest_of_tensor
from stratagem.checkpoint.directory.directory import DirectoryFormat
from stratagem.checkpoint.directory.manifest import read_manifest
from stratagem.checkpoint.directory.verify import verify_checkpoint
from stratagem.checkpoint.formats.choice import CheckpointFormat, format_for
from stratagem.checkpoint.formats.release import release_checkpoint
from stratagem.checkpoint.formats.single_file import SingleFileFormat
from stratagem.checkpoint.frozen_weights import OMITTED, FrozenWeights, omitted_digests, require_omitted_weights
from stratagem.checkpoint.remote.checkpoint_urls import find_latest_remote, remote_save_orders, save_remote
from stratagem.checkpoint.remote.sources import CheckpointLoader, read_any
from stratagem.checkpoint.staging import StagedState
from stratagem.checkpoint.tree.boxes import TensorBox, boxes_of_range
from stratagem.checkpoint.tree.evaluated import evaluated_weights, has_averaged_weights
from stratagem.checkpoint.tree.flatten import StateTree, flatten_tree, unflatten_tree
from stratagem.checkpoint.tree.gather import gather_tree
from stratagem.checkpoint.tree.load import DEFAULT_REVISE_KEYS, LoadReport, load_state_dict, match_state, weights_to_cpu
from stratagem.checkpoint.tree.names import (
    AVERAGE_PART,
    optimizer_by_index,
    optimizer_by_name,
    parameter_names,
    unwrapped_name,
    with_known_names,
)
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState, take_box, take_range

__all__ = [
    "AVERAGE_PART",
    "DEFAULT_REVISE_KEYS",
    "BackgroundSaver",
    "CheckpointInfo",
    "StagedState",
    "CheckpointFormat",
    "CheckpointLoader",
    "DirectoryFormat",
    "FrozenWeights",
    "LoadReport",
    "OMITTED",
    "ShardedTensorState",
    "RetentionTag",
    "TensorBox",
    "Retention",
    "SAVE_ORDER",
    "SaveOrder",
    "SavedCheckpoint",
    "SingleFileFormat",
    "StateTree",
    "unwrapped_name",
    "with_known_names",
    "boxes_of_range",
    "digest_of_tensor",
    "best_checkpoints",
    "find_best_checkpoint",
    "find_latest_checkpoint",
    "match_state",
    "omitted_digests",
    "require_omitted_weights",
    "format_for",
    "gather_tree",
    "inspect_checkpoint",
    "unflatten_tree",
    "find_latest_remote",
    "list_checkpoints",
    "load_checkpoint",
    "load_state_dict",
    "get_model_state",
    "record_checkpoint_folder",
    "optimizer_by_index",
    "optimizer_by_name",
    "parameter_names",
    "update_last_checkpoint",
    "read_any",
    "read_manifest",
    "release_checkpoint",
    "remove_checkpoints",
    "save_checkpoint",
    "remote_save_orders",
    "checkpoints_of_run",
    "checkpoints_by_run",
    "save_remote",
    "evaluated_weights",
    "flatten_tree",
    "has_averaged_weights",
    "take_box",
    "take_range",
    "verify_checkpoint",
    "weights_to_cpu",
    "write_to",
]
