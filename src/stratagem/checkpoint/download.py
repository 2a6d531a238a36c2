"""Checkpoints behind http and https, downloaded once and kept."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from stratagem.checkpoint.formats import SINGLE_FILES
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from stratagem.storage import atomic_file
from stratagem.utils import mask_text

__all__ = ["fetch_http"]

_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 20
# As in resnet18-f37072fd.pth: the first digits of the file's SHA-256.
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]+$")
_DIGEST_IN_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{8,64})")
_GONE = {404, 410}


def fetch_http(url: str, folder: Path) -> Path:
    """Return the copy of a file that ``folder`` keeps; the first time, download it.

    ``#sha256=<hex>`` at the URL's end, or else digits at the end of the file's name, are the beginning of the digest
    that the file must have.

    Raises:
        CheckpointNotFoundError: if the server has no such file.
        CheckpointDamagedError: if what came is not what is due.
        CheckpointError: if the download failed otherwise.
    """
    source = _Source.parse(url)
    kept = folder / source.local_name
    if not kept.exists():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            _download(source, kept)
        except urllib.error.HTTPError as error:
            error.close()
            kind = CheckpointNotFoundError if error.code in _GONE else CheckpointError
            raise kind(f"{source.shown}: the server answered {error.code} {error.reason}.") from error
        except (OSError, http.client.HTTPException) as error:
            raise CheckpointError(f"{source.shown}: the download failed: {error}.") from error
    return kept


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A URL taken apart: ``address`` is without user and fragment, ``shown`` can be printed."""

    address: str
    shown: str
    user: str
    digest: str

    @classmethod
    def parse(cls, url: str) -> Self:
        shown = mask_text(url)
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError as error:
            raise CheckpointError(f"{shown} is not a URL: {error}.") from error
        in_fragment = _DIGEST_IN_FRAGMENT.fullmatch(parts.fragment)
        if parts.fragment and not in_fragment:
            raise CheckpointError(f"{shown}: what follows # can only be sha256= and 8 to 64 hexadecimal digits.")
        found = in_fragment or _DIGEST_IN_NAME.search(parts.path)
        user, _, host = parts.netloc.rpartition("@")
        address = urllib.parse.urlunsplit(parts._replace(netloc=host, fragment=""))
        return cls(address=address, shown=shown, user=user, digest=found[1].lower() if found else "")

    @property
    def local_name(self) -> str:
        """A name that no other address has; with another digest due, it is another file."""
        name = Path(urllib.parse.urlsplit(self.address).path).name
        if Path(name).suffix not in SINGLE_FILES:
            name += ".pth"
        return f"{hashlib.sha256(f'{self.address}#{self.digest}'.encode()).hexdigest()[:12]}-{name}"

    def request(self) -> urllib.request.Request:
        request = urllib.request.Request(self.address)  # noqa: S310 -- http(s) only
        if self.user:
            user = urllib.parse.unquote(self.user).encode()
            # Not for the server that this one may redirect to.
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(user).decode()}")
        return request


def _download(source: _Source, target: Path) -> None:
    digest, count = hashlib.sha256(), 0
    with (
        urllib.request.urlopen(source.request(), timeout=_TIMEOUT_S) as answer,  # noqa: S310 -- http(s) only
        atomic_file(target) as aside,
        aside.open("wb") as file,
    ):
        while chunk := answer.read(_CHUNK_BYTES):
            digest.update(chunk)
            count += file.write(chunk)
        due = answer.headers.get("Content-Length")
        # http.client does not complain of a body that ends too early.
        if due is not None and count != int(due):
            raise CheckpointDamagedError(f"{source.shown}: {count} bytes came of {due}. Nothing was kept; try again.")
        if not digest.hexdigest().startswith(source.digest):
            raise CheckpointDamagedError(
                f"{source.shown}: its SHA-256 is {digest.hexdigest()}, but {source.digest}... is due. Nothing was kept: "
                "the file was changed. If the digits in its name are no digest, give its own as #sha256=<hex>."
            )
