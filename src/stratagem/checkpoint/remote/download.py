"""Download files over http and https once, and compare the cached copy with its digest on each use.

The URL contains the expected digest after ``#sha256=``, or its first digits at the end of the file name. Otherwise, the
digest of the first download is stored next to the copy. Over plain http, where a third party could replace the file,
the full digest is required.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
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
from stratagem.storage import atomic_file, download_once, is_link_local, is_loopback, write_atomic
from stratagem.utils import mask_text

__all__ = ["download_limit_bytes", "fetch_http"]

_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 20
_LIMIT_GB = "STRATAGEM_DOWNLOAD_LIMIT_GB"
_DEFAULT_LIMIT_GB = 100.0
_WHOLE_DIGEST = 64
_MOST_DIGITS = 20
# Most file systems limit a name to 255 bytes; leave room for a digest and the suffixes of temporary files.
_MOST_NAME_BYTES = 150
# As in resnet18-f37072fd.pth: the first digits of the file's SHA-256.
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]+$")
_DIGEST_IN_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{8,64})")
_SUFFIXES = {*SINGLE_FILES, ".safetensors", ".json"}
_NOT_FOUND = {404, 410}


def fetch_http(url: str, folder: Path, *, name: str | None = None, token: str = "") -> Path:
    """Return the copy of a file in ``folder``; download it if necessary.

    ``#sha256=<hex>`` at the end of the URL, or digits at the end of the file name, are the first digits of the expected
    digest. ``name`` is the file name of the copy; by default it is derived from the URL. ``token`` is only sent to the
    URL's own server, not to redirect targets.

    Raises:
        CheckpointNotFoundError: if the server does not have the file.
        CheckpointDamagedError: if the digest or the size of the download is wrong.
        CheckpointError: if the URL is invalid or unsafe, the file is too large, or the download fails.
    """
    source = _Source.parse(url, token)
    copy = folder / (name or source.local_name)
    record = copy.with_name(f"{copy.name}.sha256")

    def recorded() -> str:
        return record.read_text().strip() if record.is_file() else ""

    def is_complete() -> bool:
        digest = recorded()
        return bool(digest) and copy.is_file() and digest.startswith(source.digest) and _digest_of(copy) == digest

    def download() -> None:
        digest = _download(source, copy, recorded())
        # Write the digest after the file: if a digest was left without a file, later downloads would have to match it.
        write_atomic(record, f"{digest}\n")

    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        download_once(copy, is_complete, download)
    except urllib.error.HTTPError as error:
        error.close()
        error_type = CheckpointNotFoundError if error.code in _NOT_FOUND else CheckpointError
        raise error_type(f"{source.masked_url}: the server answered {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(f"{source.masked_url}: the download failed: {error}.") from error
    return copy


def download_limit_bytes() -> int:
    """Return the maximum size of a download: ``$STRATAGEM_DOWNLOAD_LIMIT_GB``, by default 100 GB.

    Raises:
        ConfigValueError: if the variable is not a positive number.
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
    """A parsed URL: ``address`` has neither user nor fragment; ``masked_url`` has no secrets."""

    address: str
    masked_url: str
    digest: str
    authorization: str = field(repr=False)

    @classmethod
    def parse(cls, url: str, token: str) -> Self:
        masked_url = mask_text(url)
        try:
            parts = urllib.parse.urlsplit(url)
        except ValueError as error:
            raise CheckpointError(f"{masked_url} is not a URL: {error}.") from error
        in_fragment = _DIGEST_IN_FRAGMENT.fullmatch(parts.fragment)
        if parts.fragment and not in_fragment:
            raise CheckpointError(f"{masked_url}: expected sha256= and 8 to 64 hexadecimal digits after #.")
        found = in_fragment or _DIGEST_IN_NAME.search(parts.path)
        user, _, host = parts.netloc.rpartition("@")
        digest = found[1].lower() if found else ""
        _require_safe(parts, digest, masked_url)
        address = urllib.parse.urlunsplit(parts._replace(netloc=host, fragment=""))
        basic = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        authorization = f"Basic {basic}" if user else f"Bearer {token}" if token else ""
        return cls(address=address, masked_url=masked_url, digest=digest, authorization=authorization)

    @property
    def local_name(self) -> str:
        """A file name that is unique for the address and the expected digest."""
        name = Path(urllib.parse.urlsplit(self.address).path).name
        # Keep the end of the name, which includes the suffix. The digest as a prefix makes the name unique.
        name = name.encode(errors="replace")[-_MOST_NAME_BYTES:].decode(errors="replace")
        if Path(name).suffix not in _SUFFIXES:
            name += ".pth"
        return f"{hashlib.sha256(f'{self.address}#{self.digest}'.encode()).hexdigest()[:12]}-{name}"

    def request(self) -> urllib.request.Request:
        request = urllib.request.Request(self.address)  # noqa: S310 -- http(s) only
        if self.authorization:
            # Do not send the header to servers to which this server redirects.
            request.add_unredirected_header("Authorization", self.authorization)
        return request


def _require_safe(parts: urllib.parse.SplitResult, digest: str, told: str) -> None:
    """Check that a URL, or the target of a redirect, is safe to download from.

    Raises:
        CheckpointError: if a third party could replace the file, or the host is a metadata service.
    """
    if is_link_local(parts.hostname):
        raise CheckpointError(
            f"{told}: {parts.hostname} is a link-local address or a metadata service, from which no files are downloaded."
        )
    if parts.scheme == "http" and len(digest) < _WHOLE_DIGEST and not is_loopback(parts.hostname):
        raise CheckpointError(
            f"{told}: over plain http, a third party could replace the file. Use https, or append the digest "
            "of the file: #sha256=<64 hexadecimal digits>."
        )


@final
class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, except those from https to an insecure scheme or to an address that is not allowed as a URL.

    Args:
        digest: the expected digest of the file; empty if it is unknown.
    """

    def __init__(self, digest: str = "") -> None:
        self._digest = digest

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        told = f"{mask_text(req.full_url)}: the server redirects to {mask_text(newurl)}"
        try:
            target = urllib.parse.urlsplit(newurl)
            scheme, host = target.scheme, target.hostname
        except ValueError as error:
            raise CheckpointError(f"{told}, which is not a URL: {error}.") from error
        if scheme not in {"https", req.type}:
            raise CheckpointError(f"{told}, from {req.type} to {scheme}. Use a URL that only redirects to https.")
        _require_safe(target, self._digest, told)
        if is_loopback(host) and not is_loopback(urllib.parse.urlsplit(req.full_url).hostname):
            raise CheckpointError(f"{told}, which is this machine. Use the URL of the file itself.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@final
class _HTTPConnection(http.client.HTTPConnection):
    """A connection that is closed if the host name resolves to a metadata service."""

    def connect(self) -> None:
        super().connect()
        _require_public_peer(self)


@final
class _HTTPSConnection(http.client.HTTPSConnection):
    """A connection that is closed if the host name resolves to a metadata service."""

    def connect(self) -> None:
        super().connect()
        _require_public_peer(self)


def _require_public_peer(connection: http.client.HTTPConnection) -> None:
    peer = connection.sock.getpeername()
    if isinstance(peer, tuple) and is_link_local(peer[0]):
        connection.close()
        raise CheckpointError(
            f"{mask_text(connection.host)} has the link-local address {peer[0]}, from which no files are downloaded."
        )


@final
class _HTTPHandler(urllib.request.HTTPHandler):
    """Open http URLs with connections that check the address of the server."""

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, req)


@final
class _HTTPSHandler(urllib.request.HTTPSHandler):
    """Open https URLs with connections that check the address of the server."""

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, req)


def _length_of(header: str | None, source: _Source) -> int | None:
    """Return the number of bytes that the server announces, or None.

    Raises:
        CheckpointError: if it is not a number.
    """
    if header is None:
        return None
    if not (header.isascii() and header.isdigit() and len(header) < _MOST_DIGITS):
        raise CheckpointError(f"{source.masked_url}: the server sent the invalid Content-Length {header[:40]!r}.")
    return int(header)


def _download(source: _Source, target: Path, recorded: str) -> str:
    """Download to ``target`` and return the digest, which must equal ``recorded`` if that is not empty."""
    limit = download_limit_bytes()
    digest, count = hashlib.sha256(), 0
    with (
        urllib.request.build_opener(_SafeRedirects(source.digest), _HTTPHandler, _HTTPSHandler).open(
            source.request(), timeout=_TIMEOUT_S
        ) as response,
        atomic_file(target) as temporary,
        temporary.open("wb") as file,
    ):
        expected = _length_of(response.headers.get("Content-Length"), source)
        if expected is not None and expected > limit:
            raise CheckpointError(f"{source.masked_url} has {expected} bytes. {_limit_hint(limit)}")
        while chunk := response.read(_CHUNK_BYTES):
            digest.update(chunk)
            count += file.write(chunk)
            if count > limit:
                raise CheckpointError(f"{source.masked_url} is larger than allowed. {_limit_hint(limit)}")
        # Check the size, because http.client does not report a truncated body.
        if expected is not None and count != expected:
            raise CheckpointDamagedError(
                f"{source.masked_url}: received {count} of {expected} bytes. The partial file was removed; try again."
            )
        if not digest.hexdigest().startswith(source.digest):
            raise CheckpointDamagedError(
                f"{source.masked_url}: its SHA-256 is {digest.hexdigest()}, expected {source.digest}... The file was "
                "removed, because it was modified. If the digits in its name are not a digest, append the digest to "
                "the URL: #sha256=<hex>."
            )
        if recorded.startswith(source.digest) and recorded and digest.hexdigest() != recorded:
            raise CheckpointDamagedError(
                f"{source.masked_url}: its SHA-256 is {digest.hexdigest()}, but it was {recorded} when the file was "
                f"first downloaded. To accept the new file, remove {target} and {target.name}.sha256 next to it."
            )
    return digest.hexdigest()


def _limit_hint(limit: int) -> str:
    return f"At most {limit} bytes are downloaded; set {_LIMIT_GB} to raise the limit."


def _digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
