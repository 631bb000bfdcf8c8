"""A browser without a window: Debian's Chromium, driven by selenium."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from benchmark.memory import descendants_bytes
from megaregion.errors import UserError

PATIENCE = 60.0
"""Seconds that a page may take."""
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


class Browser(Chrome):
    """One window."""

    def wait(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript until it returns something true.

        Raises:
            TimeoutError: It never does.
        """
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            found = self.execute_script(script, *arguments)
            if found:
                return found
            time.sleep(0.03)
        raise TimeoutError(f"the page never came to: {script}")

    def press(self, keys: str) -> None:
        """Type into whatever has the focus; WebDriver's code points stand for keys without a letter."""
        ActionChains(self, duration=0).send_keys(keys).perform()

    def resize(self, width: int, height: int) -> None:
        """Give the page a size, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def memory(self) -> int:
        """Bytes that all the browser's processes hold; what they share counts once."""
        return descendants_bytes(self.service.process.pid)


@contextmanager
def browser(width: int = 1280, height: int = 860) -> Iterator[Browser]:
    """Start a browser and end it.

    Raises:
        UserError: It is not installed or does not start.
    """
    require_programs()
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        # Both programs by their place, or selenium would look for them in the network.
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}/user"):
            options.add_argument(flag)
        # The machine's proxy has no business between us and our own driver.
        options.ignore_local_proxy_environment_variables()
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = Service(shutil.which("chromedriver"), env={**os.environ, "HOME": profile})
        try:
            window = Browser(options, driver)
        except WebDriverException as error:
            raise UserError(
                f"chromedriver does not start chromium; do their versions fit? ({error.msg})"
            ) from None
        try:
            window.resize(width, height)
            yield window
        finally:
            window.quit()
