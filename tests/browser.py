"""A page in headless Chromium. Without one the tests that need it are skipped; under CI=true they fail.

One browser serves a test process: it is driven over a pipe (Chrome's DevTools protocol, as JSON behind zero bytes).
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from select import select
from tempfile import mkdtemp
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = (
    "there is no Chromium here, so nothing says that the report's scripts work (apt-get install chromium)"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)

browser = pytest.mark.skipif(CHROMIUM is None and os.environ.get("CI") != "true", reason=MISSING)


class Chromium:
    """A running browser; `call` sends one command and waits for its answer, keeping the events before it."""

    def __init__(self) -> None:
        assert CHROMIUM is not None, MISSING
        self._profile = mkdtemp(prefix="probe-browser-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={self._profile}", "about:blank"]
        # The protocol's pipe is descriptors 3 and 4, which only a shell can name.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._rest = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []
        atexit.register(self.close)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select([self._read], [], [], 60)
            assert ready, "the browser said nothing for a minute"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._rest += part
        text, self._rest = self._rest.split(b"\0", 1)
        return json.loads(text)


@cache
def _chromium() -> Chromium:
    return Chromium()


class Tab:
    """An open page: `evaluate` JavaScript in it, its `console` lines, and `wait` for an event."""

    def __init__(self, chromium: Chromium, session: str) -> None:
        self._chromium, self._session = chromium, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._chromium.call(method, self._session, **params)

    def open(self, address: str) -> None:
        """Load, and let the page draw what it draws in its first frames."""
        self._chromium.events.clear()
        self.call("Page.navigate", url=address)
        while not self._have("Page.loadEventFired"):
            self._chromium.events.append(self._chromium.next())
        self.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        )

    def _have(self, event: str) -> bool:
        return any(
            e.get("method") == event and e.get("sessionId") == self._session for e in self._chromium.events
        )

    def evaluate(self, script: str) -> Any:
        """The value of an expression, or of its promise."""
        out = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def press(self, key: str) -> None:
        """A key as a reader presses it, with the browser's own doing."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "ArrowRight": 39}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        code = codes.get(key, ord(key[0].upper()))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    @property
    def console(self) -> list[str]:
        """What the page wrote to the console or was refused: warnings, errors and broken policies."""
        texts = []
        for event in self._chromium.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.consoleAPICalled":
                texts.append(" ".join(str(arg.get("value")) for arg in params["args"]))
            elif event.get("method") == "Runtime.exceptionThrown":
                texts.append(json.dumps(params["exceptionDetails"])[:2000])
            elif event.get("method") == "Log.entryAdded":
                texts.append(params["entry"]["text"])
        return texts


@contextmanager
def tab(
    page: Path | str, fragment: str = "", width: int = 1280, height: int = 900, scheme: str = "light"
) -> Iterator[Tab]:
    """A page of a file, or of an address, in a window of this size."""
    chromium = _chromium()
    context = chromium.call("Target.createBrowserContext")["browserContextId"]
    target = chromium.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
    session = chromium.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    opened = Tab(chromium, session)
    for domain in ("Page", "Runtime", "Log"):
        opened.call(f"{domain}.enable")
    opened.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
    )
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    opened.open((page.as_uri() if isinstance(page, Path) else page) + fragment)
    try:
        yield opened
    finally:
        chromium.call("Target.disposeBrowserContext", browserContextId=context)


def dom_of(page: Path, fragment: str = "") -> tuple[str, list[str]]:
    """The document after its script ran, and what it wrote to the console."""
    with tab(page, fragment) as opened:
        return opened.evaluate("document.documentElement.outerHTML"), opened.console
