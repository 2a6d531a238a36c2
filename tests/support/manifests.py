"""Modify manifests and recompute their digest, as an attacker or a faulty writer could."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3


def change_manifest(path: Path, **changes: Any) -> None:
    """Change entries of a checkpoint's manifest and recompute its digest; ``...`` removes an entry."""
    content = {**json.loads((path / "manifest.json").read_text()), **changes}
    seal(path, {key: value for key, value in content.items() if value is not ...})


def seal(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest that ends with the digest of its preceding contents."""
    content.pop("digest", None)
    text = json.dumps(content)[:-1].encode()
    (path / "manifest.json").write_bytes(text + b',"digest":"' + blake3(text).hexdigest().encode() + b'"}')
