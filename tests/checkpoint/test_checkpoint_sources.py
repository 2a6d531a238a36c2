"""Loading checkpoints from paths, URLs and model collections."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.checkpoint.remote import download
from stratagem.checkpoint.remote.download import _SafeRedirects
from stratagem.checkpoint.remote.sources import cache_folder
from stratagem.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigValueError,
    MissingDependencyError,
)


def file_bytes() -> bytes:
    """Return a checkpoint as a server would send it."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2)}}, buffer)
    return buffer.getvalue()


def bare_bytes() -> bytes:
    """Return a state dict as written by torch."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    return buffer.getvalue()


CONTENT = file_bytes()
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WRONG = DIGEST[::-1] if DIGEST[::-1] != DIGEST else "0" * 64


@dataclass
class Site:
    """A local server; ``requests`` lists the requested paths and Authorization headers.

    ``changed`` is served instead of the checkpoint, and ``files`` under other names.
    """

    address: str
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    changed: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)
    length: str = ""

    def code(self, name: str) -> int:
        """Return 404 for files that a Hub repository could have but this one does not."""
        is_usual = name.rpartition("/")[2].startswith(("model", "pytorch_model", "diffusion", "open_clip"))
        return 404 if is_usual and name not in self.files else 200


@pytest.fixture(scope="module")
def server() -> Iterator[Site]:
    """Serve every name that ends in .pth, and a few that fail."""
    site = Site("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requests.append((self.path, self.headers["Authorization"]))
            name = self.path.partition("?")[0]
            code = {"/missing.pth": 404, "/gone.pth": 410, "/busy.pth": 503, "/moved.pth": 302}.get(
                name, site.code(name)
            )
            self.send_response(code)
            body = site.files.get(name, site.changed or CONTENT) if code == 200 else b"no"
            if name != "/endless.pth":
                self.send_header("Content-Length", site.length or str(len(body)))
            if code == 302:
                self.send_header("Location", "/elsewhere.pth")
            self.end_headers()
            self.wfile.write(body[:100] if name == "/cut.pth" else body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        site.address = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield site
        listening.shutdown()
        thread.join()


@pytest.fixture
def site(server: Site) -> Site:
    """The server, with no requests yet."""
    server.requests.clear()
    server.changed = b""
    server.files.clear()
    server.length = ""
    return server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a proxy."""
    monkeypatch.setenv("STRATAGEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "checkpoints"


def kept(cache: Path) -> list[str]:
    """Return the names in the cache, including hidden ones, except the recorded digests."""
    names = [entry.name for entry in cache.iterdir()] if cache.exists() else []
    return sorted(name for name in names if not name.endswith(".sha256"))


def weights(name: str | Path) -> list[float]:
    """Load a checkpoint and return its only weight."""
    return CheckpointLoader.load_checkpoint(name)["state_dict"]["w"].tolist()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint in a folder with a space in its name."""
    path = tmp_path / "my runs" / "epoch_1.pth"
    save_checkpoint({"state_dict": {"w": torch.ones(2)}}, path)
    return path


def test_local_paths_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string, a Path, a relative path and a path with ~ all refer to the same file."""
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    for name in (
        saved,
        str(saved),
        "epoch_1.pth",
        "~/epoch_1.pth",
        saved.as_uri(),
        f"file://localhost{saved.as_uri()[7:]}",
    ):
        assert CheckpointLoader.fetch(name) == saved
        assert weights(name) == [1, 1]


def test_a_missing_path_suggests_similar_names(saved: Path) -> None:
    """The error for a missing path suggests a similar name, or states that the folder does not exist."""
    with pytest.raises(CheckpointNotFoundError, match=r"epoch_2\.pth: there is no .*Did you mean 'epoch_1\.pth'"):
        CheckpointLoader.fetch(saved.with_name("epoch_2.pth"))
    with pytest.raises(CheckpointNotFoundError, match=r"The folder .*elsewhere does not exist either"):
        CheckpointLoader.fetch(saved.parent / "elsewhere" / "epoch_1.pth")
    with pytest.raises(CheckpointNotFoundError, match="there is no such checkpoint"):
        CheckpointLoader.fetch(saved.with_name("epoch_2.pth").as_uri())


def test_file_urls_of_another_host_are_rejected() -> None:
    """file://data/x.pth, which lacks a slash, is not read as /x.pth."""
    with pytest.raises(CheckpointError, match="names the host 'data'"):
        CheckpointLoader.fetch("file://data/x.pth")


def test_a_url_is_downloaded_once(site: Site, cache: Path) -> None:
    """A second load uses the cached copy, and the cache contains only that copy."""
    for _ in range(2):
        assert weights(f"{site.address}/net.pth") == [1, 1]
    assert site.requests == [("/net.pth", None)]
    [name] = kept(cache)
    assert name.endswith("-net.pth")
    assert (cache / name).read_bytes() == CONTENT


def test_two_urls_with_one_name_are_two_files(site: Site, cache: Path) -> None:
    """Cached copies of URLs that differ in any part are kept separately."""
    weights(f"{site.address}/a/net.pth")
    weights(f"{site.address}/b/net.pth")
    weights(f"{site.address}/a/net.pth?version=2")
    assert len(site.requests) == len(kept(cache)) == 3


def test_a_url_without_a_suffix_is_a_single_file(site: Site) -> None:
    """A download without a file extension can be loaded."""
    assert weights(f"{site.address}/download?id=3") == [1, 1]


def test_the_digest_of_the_first_download_is_recorded(site: Site, cache: Path) -> None:
    """A modified copy is downloaded again and compared with the first download."""
    url = f"{site.address}/net.pth"
    weights(url)
    [name] = kept(cache)
    assert (cache / f"{name}.sha256").read_text() == f"{DIGEST}\n"
    (cache / name).write_bytes(CONTENT[:-1] + b"x")
    assert weights(url) == [1, 1]
    assert len(site.requests) == 2
    site.changed = b"another"
    (cache / name).write_bytes(b"")
    with pytest.raises(
        CheckpointDamagedError, match=rf"it was {DIGEST} when the file was first downloaded.* remove .*{name}"
    ):
        weights(url)


def test_a_copy_without_a_digest_is_fetched_again(site: Site, cache: Path) -> None:
    """A copy from an interrupted download is not trusted."""
    weights(f"{site.address}/net.pth")
    [name] = kept(cache)
    (cache / f"{name}.sha256").unlink()
    (cache / name).write_bytes(b"half")
    assert weights(f"{site.address}/net.pth") == [1, 1]


@pytest.mark.parametrize("mark", ["", "-0123abcd.pth", "#sha256=01234567"])
def test_plain_http_needs_the_full_digest(mark: str) -> None:
    """Plain http is only used with a full digest, because a third party could replace the file."""
    with pytest.raises(CheckpointError, match="over plain http, .* Use https"):
        CheckpointLoader.fetch(f"http://files.invalid/net{mark}")
    with pytest.raises(CheckpointError, match="download failed"):
        CheckpointLoader.fetch(f"http://files.invalid/net.pth#sha256={DIGEST}")


def test_redirects_stay_on_https() -> None:
    """A redirect from https to plain http raises an error."""
    handler, request = _SafeRedirects(), urllib.request.Request("https://a.invalid/x?token=secret")
    with pytest.raises(CheckpointError, match="from https to http") as caught:
        handler.redirect_request(request, None, 302, "", {}, "http://b.invalid/x?token=secret")
    assert "secret" not in str(caught.value)
    moved = handler.redirect_request(request, None, 302, "", {}, "https://b.invalid/x")
    assert moved is not None
    assert moved.full_url == "https://b.invalid/x"


METADATA = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "[fe80::1]",
    "[::ffff:169.254.169.254]",
    "metadata.google.internal",
]


@pytest.mark.parametrize("host", ["files.invalid", "10.0.0.1", *METADATA])
@pytest.mark.parametrize("begin", ["http://127.0.0.1:9/x.pth", "http://files.invalid/x.pth"])
def test_plain_http_is_not_redirected_to_another_host(host: str, begin: str) -> None:
    """A redirect follows the rules of the URL itself: plain http only on this machine, or with the full digest."""
    request = urllib.request.Request(begin)
    with pytest.raises(CheckpointError, match="the server redirects to .*(over plain http|link-local address)"):
        _SafeRedirects().redirect_request(request, None, 302, "", {}, f"http://{host}/x.pth")
    with_digest = _SafeRedirects(DIGEST)
    if host in METADATA:
        with pytest.raises(CheckpointError, match="link-local address or a metadata service"):
            with_digest.redirect_request(request, None, 302, "", {}, f"http://{host}/x.pth")
    else:
        assert with_digest.redirect_request(request, None, 302, "", {}, f"http://{host}/x.pth") is not None


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher"])
@pytest.mark.parametrize("begin", ["http", "https"])
def test_a_redirect_does_not_change_to_another_protocol(scheme: str, begin: str) -> None:
    """A redirect from http or https to ftp or a local file raises an error."""
    request = urllib.request.Request(f"{begin}://127.0.0.1:9/x.pth")
    with pytest.raises(CheckpointError, match=f"from {begin} to {scheme}"):
        _SafeRedirects(DIGEST).redirect_request(request, None, 302, "", {}, f"{scheme}://127.0.0.1/x.pth")


def test_another_host_does_not_redirect_to_this_machine() -> None:
    """A server elsewhere cannot make this process request local services."""
    request = urllib.request.Request("https://files.invalid/x.pth")
    with pytest.raises(CheckpointError, match="which is this machine"):
        _SafeRedirects().redirect_request(request, None, 302, "", {}, "https://127.1:8443/x.pth")


@pytest.mark.parametrize("host", METADATA)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_metadata_services_are_never_read(host: str, scheme: str) -> None:
    """Link-local addresses in any notation are rejected, also with a digest."""
    with pytest.raises(CheckpointError, match="link-local address or a metadata service"):
        CheckpointLoader.fetch(f"{scheme}://{host}/x.pth#sha256={DIGEST}")


def test_a_name_that_leads_to_a_metadata_service_is_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of the connection counts, not only the host in the URL."""
    monkeypatch.setattr(download, "is_link_local", lambda host: host == "127.0.0.1")
    address = site.address.replace("127.0.0.1", "localhost")
    with pytest.raises(CheckpointError, match=r"localhost has the link-local address 127\.0\.0\.1"):
        CheckpointLoader.fetch(f"{address}/net.pth")
    assert site.requests == []


@pytest.mark.parametrize("scheme", ["ftp", "webhdfs"])
def test_protocols_without_encryption_are_rejected(scheme: str) -> None:
    """Files are neither read from nor written to another host over a protocol without encryption."""
    with pytest.raises(CheckpointError, match=f"(?i){scheme}:// is not encrypted"):
        CheckpointLoader.fetch(f"{scheme}://files.invalid/run/x.pth")
    with pytest.raises(CheckpointError, match=f"(?i){scheme}:// is not encrypted"):
        save_checkpoint({"state_dict": {}}, f"{scheme}://files.invalid/run/epoch_1")


@pytest.mark.parametrize("length", ["abc", "-5", "1.5", "9" * 30, "²"])
def test_an_invalid_size_is_an_error_of_the_server(site: Site, length: str) -> None:
    """A Content-Length that is not a number is reported with the URL."""
    site.length = length
    with pytest.raises(CheckpointError, match=r"net\.pth: the server sent the invalid Content-Length"):
        CheckpointLoader.fetch(f"{site.address}/net.pth")


def test_a_url_with_a_long_name_is_downloaded(site: Site, cache: Path) -> None:
    """The name of the copy is shortened, since file systems allow 255 bytes; copies of different URLs stay separate."""
    for start in "ab":
        assert weights(f"{site.address}/{start}{'x' * 400}.pth") == [1, 1]
    assert len(kept(cache)) == 2
    with pytest.raises(CheckpointNotFoundError, match="there is no such checkpoint"):
        CheckpointLoader.fetch("x" * 400)


@pytest.mark.parametrize("name", ["net.pth", "endless.pth"])
def test_a_download_is_not_larger_than_allowed(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The limit applies whether or not the server sends the size, and nothing is kept."""
    monkeypatch.setenv("STRATAGEM_DOWNLOAD_LIMIT_GB", "1e-7")
    with pytest.raises(CheckpointError, match="At most 100 bytes are downloaded; set STRATAGEM_DOWNLOAD_LIMIT_GB"):
        weights(f"{site.address}/{name}")
    assert kept(cache) == []
    monkeypatch.setenv("STRATAGEM_DOWNLOAD_LIMIT_GB", "many")
    with pytest.raises(ConfigValueError, match="'many' must be a positive number of gigabytes"):
        weights(f"{site.address}/{name}")


@pytest.mark.parametrize(
    "mark", [f"-{DIGEST[:8]}.pth", f"-{DIGEST}.pth", f".pth#sha256={DIGEST}", f".pth#sha256={DIGEST[:8].upper()}"]
)
def test_a_right_digest_is_accepted(site: Site, mark: str) -> None:
    """A digest is accepted in the file name or after #, in full or abbreviated."""
    assert weights(f"{site.address}/net{mark}") == [1, 1]


@pytest.mark.parametrize("mark", [f"-{WRONG[:8]}.pth", f".pth#sha256={WRONG}", f"-{DIGEST[:8]}.pth#sha256={WRONG}"])
def test_a_wrong_digest_keeps_nothing(site: Site, cache: Path, mark: str) -> None:
    """A wrong digest is reported with both digests, nothing is kept, and a digest after # takes precedence."""
    with pytest.raises(CheckpointDamagedError, match=f"its SHA-256 is {DIGEST}, expected {WRONG[:8]}"):
        CheckpointLoader.fetch(f"{site.address}/net{mark}")
    assert kept(cache) == []


def test_a_digest_given_later_is_checked_too(site: Site) -> None:
    """A cached copy is checked against a digest that is given later."""
    weights(f"{site.address}/net.pth")
    with pytest.raises(CheckpointDamagedError, match="SHA-256"):
        CheckpointLoader.fetch(f"{site.address}/net.pth#sha256={WRONG}")


@pytest.mark.parametrize("fragment", ["sha256=", "sha256=xyz", "sha256=abc", "md5=0123456789abcdef", "top"])
def test_an_invalid_fragment_is_rejected(site: Site, fragment: str) -> None:
    """A malformed digest raises an error instead of being ignored."""
    with pytest.raises(CheckpointError, match="expected sha256= and 8 to 64"):
        CheckpointLoader.fetch(f"{site.address}/net.pth#{fragment}")
    assert site.requests == []


def test_a_truncated_transfer_keeps_nothing(site: Site, cache: Path) -> None:
    """A truncated transfer is reported as damage, even without a digest."""
    with pytest.raises(CheckpointDamagedError, match=f"received 100 of {len(CONTENT)}"):
        CheckpointLoader.fetch(f"{site.address}/cut.pth")
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [("missing", CheckpointNotFoundError, 404), ("gone", CheckpointNotFoundError, 410), ("busy", CheckpointError, 503)],
)
def test_server_errors_are_reported(site: Site, cache: Path, name: str, kind: type[Exception], code: int) -> None:
    """The error contains the HTTP status; only missing files raise the not-found error."""
    with pytest.raises(CheckpointError, match=rf"/{name}\.pth: the server answered {code}") as caught:
        CheckpointLoader.fetch(f"{site.address}/{name}.pth")
    assert type(caught.value) is kind
    assert kept(cache) == []


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/x.pth", "http:///x.pth", "http://127.0.0.1:port/x.pth", "http://[/x.pth"]
)
def test_no_response_is_a_checkpoint_error(address: str, cache: Path) -> None:
    """A refused connection and an invalid address raise errors with the address."""
    with pytest.raises(CheckpointError, match=r"/x\.pth") as caught:
        CheckpointLoader.fetch(address)
    assert type(caught.value) is CheckpointError
    assert kept(cache) == []


def test_a_cache_that_cannot_be_created_is_a_checkpoint_error(site: Site, tmp_path: Path) -> None:
    """A file in place of the cache folder raises an error with its path."""
    (tmp_path / "cache").write_text("x")
    with pytest.raises(CheckpointError, match=r"the download failed: .*cache"):
        CheckpointLoader.fetch(f"{site.address}/net.pth")


def test_credentials_in_a_url_are_used_and_never_shown(site: Site, cache: Path) -> None:
    """User and password are sent only to that server, and no error contains them."""
    address = site.address.replace("://", "://me:s%20cret@")
    weights(f"{address}/net.pth")
    assert site.requests == [("/net.pth", "Basic " + base64.b64encode(b"me:s cret").decode())]
    site.requests.clear()
    weights(f"{address}/moved.pth")
    assert [login is not None for _, login in site.requests] == [True, False]
    for name in ("missing.pth", "busy.pth", "cut.pth", f"a-{WRONG[:8]}.pth", "a.pth#top"):
        with pytest.raises(CheckpointError, match=r"\*\*\*@127") as caught:
            CheckpointLoader.fetch(f"{address}/{name}")
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1:9/x.pth", "ftps://me:secret@host/x.pth", "file://me:secret@host/x"]
)
def test_secrets_in_other_failures_are_masked(url: str) -> None:
    """The password in an invalid URL is never printed."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointLoader.fetch(url)
    assert "secret" not in str(caught.value)


def test_secrets_in_the_query_are_masked(site: Site) -> None:
    """A token in the query is not printed."""
    with pytest.raises(CheckpointNotFoundError) as caught:
        CheckpointLoader.fetch(f"{site.address}/missing.pth?token=secret")
    assert "secret" not in str(caught.value)


def test_a_missing_torchvision_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchvision, the error for torchvision:// contains the install command."""
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingDependencyError, match="pip install torchvision"):
        CheckpointLoader.fetch("torchvision://resnet18")


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Use the server as the Hugging Face Hub."""
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    return site


def test_a_file_of_the_hub_is_fetched(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf://organization/repository/file is that file at main, requested with the user's token."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert weights("hf://org/net/sub/weights.pth") == [1, 1]
    assert weights(f"hf://org/net@v1%2F2/weights.pth#sha256={DIGEST}") == [1, 1]
    assert hub.requests == [
        ("/org/net/resolve/main/sub/weights.pth", "Bearer secret"),
        ("/org/net/resolve/v1%2F2/weights.pth", "Bearer secret"),
    ]
    with pytest.raises(CheckpointDamagedError, match="its SHA-256 is .*, expected"):
        CheckpointLoader.fetch(f"hf://org/net/other.pth#sha256={WRONG}")


def test_a_repository_of_the_hub_is_fetched(hub: Site) -> None:
    """Without a file name, the usual files are tried in turn; with an index, all its files are fetched."""
    repositories = {
        "/org/shards/resolve/main/model.safetensors.index.json": json.dumps(
            {"weight_map": {"w": "model-1.safetensors"}}
        ).encode(),
        "/org/shards/resolve/main/model-1.safetensors": save({"w": torch.ones(2)}),
        "/org/old/resolve/main/pytorch_model.bin": bare_bytes(),
    }
    hub.files.update(repositories)
    assert weights("hf://org/shards") == [1, 1]
    assert [path for path, _ in hub.requests] == [
        "/org/shards/resolve/main/model.safetensors",
        "/org/shards/resolve/main/model.safetensors.index.json",
        "/org/shards/resolve/main/model-1.safetensors",
    ]
    assert weights("hf://org/old") == [1, 1]
    with pytest.raises(CheckpointNotFoundError, match="does not contain any of model.safetensors, .* Specify a file"):
        weights("hf://org/empty")


@pytest.mark.parametrize(
    "name", ["hf://net", "hf://org/net/../../x.pth", "hf://org/net@", "hf://", "hf://a/b@c d/../x"]
)
def test_malformed_hub_names_are_rejected(name: str) -> None:
    """Malformed hf:// names are rejected with the expected form."""
    with pytest.raises(CheckpointError, match="expected hf://<organization>/<repository>"):
        CheckpointLoader.fetch(name)


def test_a_missing_timm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm, the error for timm:// contains the install command."""
    for module in ("timm", "timm.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install stratagem\[timm\]"):
        CheckpointLoader.fetch("timm://resnet18")


def test_timm_names_are_fetched_from_the_hub(hub: Site) -> None:
    """The URL is looked up in timm, and the error for a misspelled name suggests the closest one."""
    pytest.importorskip("timm")
    hub.files["/timm/resnet18.a1_in1k/resolve/main/model.safetensors"] = save({"w": torch.ones(2)})
    assert weights("timm://resnet18") == weights("timm://resnet18.a1_in1k") == [1, 1]
    with pytest.raises(
        CheckpointNotFoundError, match="timm has no weights 'resnet18.a1_in2k'. Did you mean 'resnet18.a1_in1k'"
    ):
        CheckpointLoader.fetch("timm://resnet18.a1_in2k")


@pytest.mark.parametrize("scheme", ["open-mmlab", "openmmlab"])
def test_an_unknown_weight_name_suggests_a_similar_one(scheme: str) -> None:
    """The error for a misspelled name of published weights suggests the closest one."""
    with pytest.raises(CheckpointNotFoundError, match=r"'vgg16_cafe'\. Did you mean 'vgg16_caffe'"):
        CheckpointLoader.fetch(f"{scheme}://vgg16_cafe")


def test_an_unknown_scheme_suggests_similar_ones() -> None:
    """The error for an unknown scheme suggests similar ones."""
    with pytest.raises(CheckpointError, match=r"htps:///x\.pth: unknown scheme htps://.*'https://'"):
        CheckpointLoader.fetch("htps:///x.pth")


@pytest.fixture
def own_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo all registrations after the test."""
    monkeypatch.setattr(CheckpointLoader, "_fetchers", dict(CheckpointLoader._fetchers))


@pytest.mark.usefixtures("own_schemes")
def test_users_can_register_schemes(saved: Path, tmp_path: Path) -> None:
    """A registered function returns the local path; the longest matching prefix decides."""
    CheckpointLoader.register_scheme("zoo://")(lambda _: tmp_path / "other")
    CheckpointLoader.register_scheme(["zoo://a/", "farm://"])(lambda name: saved.parent / name.rpartition("/")[2])
    assert CheckpointLoader.fetch("zoo://b") == tmp_path / "other"
    assert weights("zoo://a/epoch_1.pth") == [1, 1]
    assert weights("farm://epoch_1.pth") == [1, 1]


@pytest.mark.usefixtures("own_schemes")
def test_a_scheme_is_replaced_only_with_force(saved: Path) -> None:
    """Registering an existing prefix raises an error, and registers none of the others in the call."""
    with pytest.raises(ConfigValueError, match=r"'https://' is already registered. Pass force=True"):
        CheckpointLoader.register_scheme(["new://", "https://"])(lambda _: saved)
    with pytest.raises(CheckpointError, match="unknown scheme new://"):
        CheckpointLoader.fetch("new://x")
    CheckpointLoader.register_scheme("https://", force=True)(lambda _: saved)
    assert CheckpointLoader.fetch("https://host/x.pth") == saved


def test_the_cache_folder_can_be_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """STRATAGEM_CACHE has precedence over XDG_CACHE_HOME, which has precedence over the user's cache folder."""
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("STRATAGEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "stratagem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "stratagem"
