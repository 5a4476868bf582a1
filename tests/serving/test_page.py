"""The status page in a real browser, at the size of a screen and of a phone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from support.servers import Served, serving

pytestmark = pytest.mark.engine
# without them it looks for hosts of its maker at every start
_QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        why = "NO BROWSER HERE: install chromium (apt install chromium)"
        if os.environ.get("KVPSI_REQUIRE_BROWSER") == "1":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_QUIET)
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 800)])
def test_it_shows_what_goes_on_and_chats(served: Served, browser: Browser, width: int, height: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": height})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(served.url) else None)
    page.goto(served.url)
    page.wait_for_function("document.querySelector('#model').textContent === 'small'")
    assert "governed" in page.inner_text("#state")
    page.fill("#question", "Name three colours.")
    page.click("#send")
    page.wait_for_function("document.querySelector('#chat .assistant')?.textContent.length > 20", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('figure .main-svg').length >= 5", timeout=60_000)
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'", timeout=60_000)
    assert page.locator("#events li").count() >= 1
    assert re.fullmatch(r"\d\d:\d\d:\d\d", page.inner_text("#events li:first-child time"))
    assert "answering / waiting" in page.inner_text(".tiles")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it has to be scrolled sideways"
    assert problems == []
    page.evaluate(
        """fetch("v1/kvpsi/history").then((response) => response.json()).then((told) => {
            const memory = {resident_bytes: 3 * MIB, sessions_bytes: 300 * MIB, capacity_bytes: 360 * MIB};
            const counts = {sessions: 52, sessions_parked: 3, parked_bytes: 12 * MIB};
            show({...told.status, ...memory, ...counts}, told.series, told.events);
            window.tiles = document.querySelector(".tiles").innerText;
        })"""
    )
    tiles = " ".join(page.evaluate("window.tiles").split())
    assert "303 MiB of 360 MiB memory of conversations (cache 3.0 MiB, saved 300 MiB)" in tiles
    assert "49 (300 MiB) saved conversations, parked 3 (12.0 MiB on disk)" in tiles
    page.close()


def test_it_asks_for_the_key_and_stops_an_answer(default_model: Path, tmp_path: Path, browser: Browser) -> None:
    with serving(default_model, tmp_path, "-c", "4096", "--api-key", "secret") as served:
        page = browser.new_page()
        page.goto(served.url)
        page.wait_for_selector("#login[open]")
        assert not page.is_visible("#wrong")
        page.fill("#key", "guessed")
        page.click("#login button")
        page.wait_for_selector("#wrong", state="visible")
        page.fill("#key", "secret")
        page.click("#login button")
        page.wait_for_function("document.querySelector('#state').textContent.startsWith('governed')")
        page.fill("#question", "Tell a very long story.")
        page.click("#send")
        page.wait_for_function("document.querySelector('#chat .assistant')?.textContent.length > 5", timeout=60_000)
        page.click("#send")
        page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
        assert page.locator("#chat .error").count() == 0
        page.close()
