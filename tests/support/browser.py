"""Open a file in headless Chromium through its debugging pipe, and look at it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Page", "open_browser", "require_chromium"]

# Chromium must not contact its own services either.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
_TIMEOUT_S = 60.0


def require_chromium() -> str:
    """Return the path of Chromium; skip the test if it is not installed, or fail if STRATAGEM_REQUIRE_CHROMIUM is set."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is not None:
        return path
    reason = "Chromium is not installed (Debian: apt-get install chromium)."
    if os.environ.get("STRATAGEM_REQUIRE_CHROMIUM"):
        pytest.fail(reason)
    pytest.skip(reason)


class Page:
    """A page of a browser.

    Attributes:
        errors: exceptions, and messages of the console at the level of errors and warnings.
        requests: the URLs that were requested.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._reading, self._writing = reading, writing
        self._rest = b""
        self._number = 0
        self._session = ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of this size, and wait until its script has run."""
        self.errors.clear()
        self.requests.clear()
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=file.as_uri())
        self.wait_for("document.documentElement?.dataset.ready === 'yes'")
        self.settle()

    def resize(self, width: int, height: int) -> None:
        """Change the size of the window."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def settle(self) -> None:
        """Wait until the page has been painted."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{condition} did not become true; errors: {self.errors}"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move_pointer(self, x: float, y: float) -> None:
        """Move the pointer to a position in the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Save a picture of the whole page, or of the window."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
            self.errors.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
            self.errors.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._reading, 1 << 16)
            assert more, "Chromium has exited"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def open_browser() -> Iterator[Page]:
    """Start Chromium, and yield a page; skip the test if Chromium is not installed."""
    chromium = require_chromium()
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="stratagem-chromium-", ignore_cleanup_errors=True) as profile:
        # The browser reads commands from descriptor 3 and writes to descriptor 4, which the pipes must not have themselves.
        reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1]))
        os.close(to_browser[0])
        os.close(from_browser[1])
        redirect = f'exec "$0" "$@" 3<&{reading} 4>&{writing}'
        browser = subprocess.Popen(
            ["/bin/bash", "-c", redirect, chromium, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(reading, writing),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reading)
        os.close(writing)
        try:
            yield Page(from_browser[0], to_browser[1])
        finally:
            browser.terminate()
            browser.wait(_TIMEOUT_S)
            os.close(from_browser[0])
            os.close(to_browser[1])
