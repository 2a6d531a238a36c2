"""Files behind http and https, downloaded once, and compared with their digest at each use.

The digest that a file must have stands behind ``#sha256=`` in the URL, or its beginning at the end of the file's name.
Where it stands nowhere, that of the first download is recorded beside the copy. Over plain http somebody in between
could give another file, so there the whole digest is required.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import ipaddress
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

from stratagem.checkpoint.formats.choice import SINGLE_FILES
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, ConfigValueError
from stratagem.storage import atomic_file, write_atomic
from stratagem.utils import mask_text

__all__ = ["download_limit_bytes", "fetch_http"]

_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 20
_LIMIT_GB = "STRATAGEM_DOWNLOAD_LIMIT_GB"
_DEFAULT_LIMIT_GB = 100.0
_WHOLE_DIGEST = 64
# As in resnet18-f37072fd.pth: the first digits of the file's SHA-256.
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]+$")
_DIGEST_IN_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{8,64})")
_SUFFIXES = {*SINGLE_FILES, ".safetensors", ".json"}
_GONE = {404, 410}


def fetch_http(url: str, folder: Path, *, name: str | None = None, token: str = "") -> Path:
    """Return the copy of a file that ``folder`` keeps; the first time, download it.

    ``#sha256=<hex>`` at the URL's end, or else digits at the end of the file's name, are the beginning of the digest
    that the file must have. ``name`` is that of the copy, where one made of the URL will not do. ``token`` is sent to
    the URL's own server alone.

    Raises:
        CheckpointNotFoundError: if the server has no such file.
        CheckpointDamagedError: if what came is not what is due.
        CheckpointError: if the URL does not say enough, the file is too large, or the download failed otherwise.
    """
    source = _Source.parse(url, token)
    kept = folder / (name or source.local_name)
    record = kept.with_name(f"{kept.name}.sha256")
    recorded = record.read_text().strip() if record.is_file() else ""
    if recorded and kept.is_file() and recorded.startswith(source.digest) and _digest_of(kept) == recorded:
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        digest = _download(source, kept, recorded)
        # After the file: a record without one would hold a later download to it.
        write_atomic(record, f"{digest}\n")
    except urllib.error.HTTPError as error:
        error.close()
        kind = CheckpointNotFoundError if error.code in _GONE else CheckpointError
        raise kind(f"{source.shown}: the server answered {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(f"{source.shown}: the download failed: {error}.") from error
    return kept


def download_limit_bytes() -> int:
    """Return how large a download may be: ``$STRATAGEM_DOWNLOAD_LIMIT_GB``, or 100 GB.

    Raises:
        ConfigValueError: if the variable holds no positive number.
    """
    text = os.environ.get(_LIMIT_GB, str(_DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ConfigValueError(f"{_LIMIT_GB}={text!r} must be a positive number of gigabytes.")
    return int(min(limit, 1e9) * 1e9)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A URL taken apart: ``address`` is without user and fragment, ``shown`` can be printed."""

    address: str
    shown: str
    digest: str
    authorization: str = field(repr=False)

    @classmethod
    def parse(cls, url: str, token: str) -> Self:
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
        digest = found[1].lower() if found else ""
        if parts.scheme == "http" and len(digest) < _WHOLE_DIGEST and not _is_here(parts.hostname):
            raise CheckpointError(
                f"{shown}: over plain http anybody in between could give another file. Use https, or say the file's digest: "
                "#sha256=<64 hexadecimal digits>."
            )
        address = urllib.parse.urlunsplit(parts._replace(netloc=host, fragment=""))
        basic = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        authorization = f"Basic {basic}" if user else f"Bearer {token}" if token else ""
        return cls(address=address, shown=shown, digest=digest, authorization=authorization)

    @property
    def local_name(self) -> str:
        """A name that no other address has; with another digest due, it is another file."""
        name = Path(urllib.parse.urlsplit(self.address).path).name
        if Path(name).suffix not in _SUFFIXES:
            name += ".pth"
        return f"{hashlib.sha256(f'{self.address}#{self.digest}'.encode()).hexdigest()[:12]}-{name}"

    def request(self) -> urllib.request.Request:
        request = urllib.request.Request(self.address)  # noqa: S310 -- http(s) only
        if self.authorization:
            # Not for the server that this one may redirect to.
            request.add_unredirected_header("Authorization", self.authorization)
        return request


@final
class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to where somebody in between could give another file."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in {"https", req.type}:
            raise CheckpointError(
                f"{mask_text(req.full_url)}: the server sends to {mask_text(newurl)}, from https to {scheme}. Name a URL that "
                "stays with https."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(source: _Source, target: Path, recorded: str) -> str:
    """Download to ``target``, and return the digest; it must be the recorded one, where there is one."""
    limit = download_limit_bytes()
    digest, count = hashlib.sha256(), 0
    with (
        urllib.request.build_opener(_SafeRedirects).open(source.request(), timeout=_TIMEOUT_S) as answer,
        atomic_file(target) as aside,
        aside.open("wb") as file,
    ):
        due = answer.headers.get("Content-Length")
        if due is not None and int(due) > limit:
            raise CheckpointError(f"{source.shown} has {due} bytes. {_how_to_raise(limit)}")
        while chunk := answer.read(_CHUNK_BYTES):
            digest.update(chunk)
            count += file.write(chunk)
            if count > limit:
                raise CheckpointError(f"{source.shown} has more bytes than it may. {_how_to_raise(limit)}")
        # http.client does not complain of a body that ends too early.
        if due is not None and count != int(due):
            raise CheckpointDamagedError(f"{source.shown}: {count} bytes came of {due}. Nothing was kept; try again.")
        if not digest.hexdigest().startswith(source.digest):
            raise CheckpointDamagedError(
                f"{source.shown}: its SHA-256 is {digest.hexdigest()}, but {source.digest}... is due. Nothing was kept: "
                "the file was changed. If the digits in its name are no digest, give its own as #sha256=<hex>."
            )
        if recorded.startswith(source.digest) and recorded and digest.hexdigest() != recorded:
            raise CheckpointDamagedError(
                f"{source.shown}: its SHA-256 is {digest.hexdigest()}, but it was {recorded} when it was first downloaded. "
                f"If the new file is meant, remove {target} and {target.name}.sha256 beside it."
            )
    return digest.hexdigest()


def _how_to_raise(limit: int) -> str:
    return f"At most {limit} are downloaded; {_LIMIT_GB} raises that."


def _is_here(host: str | None) -> bool:
    """Tell whether what is asked of a host never leaves this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
