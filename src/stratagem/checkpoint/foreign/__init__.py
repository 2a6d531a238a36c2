"""Read other programs' checkpoints: their weights and, if present, optimizer state and training progress."""

from stratagem.checkpoint.foreign.colossalai import ENGINE_ORDER, ENGINE_PART, TIED, ColossalAIFolder
from stratagem.checkpoint.foreign.deepspeed import (
    DEEPSPEED_STATE,
    deepspeed_meta,
    is_deepspeed_folder,
    read_deepspeed_folder,
)
from stratagem.checkpoint.foreign.detect import read_parts
from stratagem.checkpoint.foreign.hugging_face import WEIGHT_FILES, HuggingFaceFormat, shards_of
from stratagem.checkpoint.foreign.torch_file import is_torch_zip, open_torch_file, verify_torch_file

__all__ = [
    "DEEPSPEED_STATE",
    "WEIGHT_FILES",
    "HuggingFaceFormat",
    "deepspeed_meta",
    "is_deepspeed_folder",
    "is_torch_zip",
    "open_torch_file",
    "read_deepspeed_folder",
    "ENGINE_ORDER",
    "ENGINE_PART",
    "TIED",
    "ColossalAIFolder",
    "read_parts",
    "shards_of",
    "verify_torch_file",
]
