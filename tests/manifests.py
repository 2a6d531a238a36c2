"""Change a manifest as nobody but its writer could: with a seal that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3


def change_manifest(path: Path, **changes: Any) -> None:
    """Change entries of a checkpoint's manifest and seal it anew; ``...`` takes one away."""
    content = {**json.loads((path / "manifest.json").read_text()), **changes}
    seal(path, {key: value for key, value in content.items() if value is not ...})


def seal(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest that ends in the digest of all before it."""
    content.pop("digest", None)
    text = json.dumps(content)[:-1].encode()
    (path / "manifest.json").write_bytes(text + b',"digest":"' + blake3(text).hexdigest().encode() + b'"}')
