"""A browser without a window: Chromium, driven by the plain WebDriver protocol over HTTP.

Needs Debian's chromium and chromium-driver, and no package.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.memory import descendants_bytes
from megaregion.errors import UserError

PATIENCE = 60.0
"""Seconds that a page or the browser's start may take."""
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--allow-file-access-from-files=false",
)  # fmt: skip


def missing_programs() -> list[str]:
    """Programs that a browser needs and this machine lacks."""
    return [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


def require_programs() -> None:
    """See that the browser is there.

    Raises:
        UserError: A program that it needs is not installed.
    """
    missing = missing_programs()
    if missing:
        raise UserError(f"{' and '.join(missing)} cannot be found; apt-get install chromium chromium-driver")


class Browser:
    """One window.

    Args:
        session: Address of the WebDriver session.
        driver: Process of the driver, whose children are the browser.
    """

    def __init__(self, session: str, driver: int) -> None:
        self._session, self._driver = session, driver

    def open(self, address: str) -> None:
        """Load a page and wait until it is loaded."""
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; give what it returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript until it returns something true.

        Raises:
            TimeoutError: It never does.
        """
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            found = self.run(script, *arguments)
            if found:
                return found
            time.sleep(0.03)
        raise TimeoutError(f"the page never came to: {script}")

    def press(self, keys: str) -> None:
        """Type into whatever has the focus; WebDriver's code points stand for keys without a letter."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, x: int, y: int) -> None:
        """Move the mouse to a point of the page, in CSS pixels, and click."""
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "duration": 0, "x": x, "y": y}]
        actions += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def resize(self, width: int, height: int) -> None:
        """Give the page a size, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Prefer a color scheme, light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", {"features": features})

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        """Send a command of Chromium's own protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def complaints(self) -> list[str]:
        """What the console was told since the last call, debugging aside: errors, warnings, failed loads."""
        lines = self._call("POST", "/se/log", {"type": "browser"})
        return [line["message"] for line in lines if line["level"] in ("SEVERE", "WARNING")]

    def memory(self) -> int:
        """Bytes that all the browser's processes hold; what they share counts once."""
        return descendants_bytes(self._driver)

    def screenshot(self, path: Path) -> None:
        """Save what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        return _request(method, self._session + path, content)


@contextmanager
def browser(width: int = 1280, height: int = 860) -> Iterator[Browser]:
    """Start a browser and end it.

    Raises:
        UserError: It is not installed or does not start.
    """
    require_programs()
    with (
        tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile,
        socket.socket() as probe,
    ):
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            _until_ready(address, driver)
            options = {"args": [*FLAGS, f"--user-data-dir={profile}/user"]}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            made = _request("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            window = Browser(f"{address}/session/{made['sessionId']}", driver.pid)
            window.resize(width, height)
            try:
                yield window
            finally:
                _request("DELETE", f"{address}/session/{made['sessionId']}", None)
        finally:
            driver.terminate()
            driver.wait(PATIENCE)


def _until_ready(address: str, driver: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and driver.poll() is None:
        try:
            if _request("GET", f"{address}/status", None)["ready"]:
                return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise UserError("chromedriver does not start; does its version fit chromium's?")


def _request(method: str, address: str, content: Any) -> Any:
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method=method)
    # The machine's proxy has no business between us and our own driver.
    opener: Callable[..., Any] = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    try:
        with opener(request, timeout=2 * PATIENCE) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        value = json.load(error)["value"]
        raise RuntimeError(f"{value['error']}: {value['message'].splitlines()[0]}") from None
