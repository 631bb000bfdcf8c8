"""What tests ask of a page: that it is whole, fetches nothing, and opens in a browser without a complaint."""

from __future__ import annotations

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
)


class Page(HTMLParser):
    """Checks that tags are balanced; collects the tags, what the page would fetch, and its text."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def open_in_browser(page: Path, profile: Path) -> str:
    """The page's content as a browser has built it, if it had no complaint."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not installed; CI needs it to open the page")
        pytest.skip("chromium is not installed")
    command = [chromium, *FLAGS.split(), f"--user-data-dir={profile}", page.as_uri()]
    opened = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" not in opened.stderr
    return opened.stdout
