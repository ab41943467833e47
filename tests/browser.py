"""Drives a real headless Chromium over DevTools' pipe: what a page logs, requests, measures and looks like."""

from __future__ import annotations

import base64
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

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_OPTIONS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
_PATIENCE = 60.0


class Page:
    """One tab. `logged` has the console's errors, warnings and exceptions. `requested` has every requested address
    except the page's own and data URLs."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer, self._number = write, read, b"", 0
        self._session: str | None = None
        self._opened = "about:blank"
        self.logged: list[str] = []
        self.requested: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Loads a file on a screen `width` CSS pixels wide, which is a phone below 600."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                   mobile=width < 600)  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self._opened = path.absolute().as_uri()
        self._call("Page.navigate", url=self._opened)
        until = time.monotonic() + _PATIENCE
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            assert time.monotonic() < until, "the page did not load"
            time.sleep(0.05)
        assert self.run("location.href") == self._opened, f"{path} could not be opened"
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression: str) -> Any:
        """Returns the awaited value of a JavaScript expression, run as if the user had touched the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
                           userGesture=True)  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def allow(self, *permissions: str) -> None:
        session, self._session = self._session, None
        self._call("Browser.grantPermissions", permissions=list(permissions))
        self._session = session

    def picture(self, path: Path) -> None:
        """Writes the whole page as PNG."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 2**16)
            assert piece, "Chromium has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str, about: dict[str, Any]) -> None:
        match event:
            case "Log.entryAdded":
                self.logged.append(about["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.logged.append(" ".join(str(one.get("value")) for one in about["args"]))
            case "Runtime.exceptionThrown":
                self.logged.append(about["exceptionDetails"]["text"])
            case "Network.requestWillBeSent":
                url = about["request"]["url"]
                if not url.startswith("data:") and url != self._opened:
                    self.requested.append(url)


@contextmanager
def browser() -> Iterator[Page]:
    assert CHROMIUM is not None
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()

    def hand_over() -> None:  # DevTools reads from 3 and writes to 4
        first, second = os.dup(their_read), os.dup(their_write)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=hand_over,
        )  # fmt: skip
        os.close(their_read)
        os.close(their_write)
        try:
            yield Page(our_write, our_read)
        finally:
            process.kill()
            process.wait()
            os.close(our_write)
            os.close(our_read)
