"""What tests ask of a page: that it is whole, fetches nothing, and opens in a browser without a complaint."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from selenium.webdriver.common.actions.action_builder import ActionBuilder

from benchmark.browser import Browser, browser, missing_programs


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


def click(window: Browser, x: int, y: int) -> None:
    """Move the mouse to a point of the page, in CSS pixels, and click."""
    actions = ActionBuilder(window, duration=0)
    actions.pointer_action.move_to_location(x, y).click()
    actions.perform()


def prefer(window: Browser, scheme: str) -> None:
    """Prefer a color scheme, light or dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def complaints(window: Browser) -> list[str]:
    """What the console was told since the last call, debugging aside: errors, warnings, failed loads."""
    lines = window.get_log("browser")
    return [line["message"] for line in lines if line["level"] in ("SEVERE", "WARNING")]


def require_browser() -> None:
    """Skip the test where there is no browser; in CI there must be one."""
    missing = " and ".join(missing_programs())
    if missing:
        assert os.environ.get("CI") != "true", f"{missing} not installed; CI needs them to open pages"
        pytest.skip(f"{missing} not installed")


def open_in_browser(page: Path) -> str:
    """The page's content as a browser has built it, if it said nothing on the console."""
    require_browser()
    with browser() as window:
        window.get(page.as_uri())
        assert window.get_log("browser") == []
        return str(window.page_source)
