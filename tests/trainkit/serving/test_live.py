"""The live page in a real browser: what it shows is what was served."""

import shutil
from pathlib import Path

import pytest
from serving_server import TOKEN, serving

pytest.importorskip("litserve", reason="needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
CHROMIUM = shutil.which("chromium")

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")]


def test_the_page_shows_what_was_served(tmp_path: Path) -> None:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with serving(tmp_path) as server, playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=arguments)
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        # everything it needs is on it
        page.on("request", lambda r: errors.append(r.url) if not r.url.startswith(server.url) else None)
        page.goto(f"{server.url}/live")
        page.get_by_text("The server asks for its token.").wait_for()
        page.get_by_label("Bearer token").fill("wrong-wrong-wrong")
        page.get_by_role("button", name="Show").click()
        page.get_by_text("This token is not the server's.").wait_for()
        page.get_by_label("Bearer token").fill(TOKEN)
        page.get_by_role("button", name="Show").click()
        page.get_by_label("Bearer token").wait_for(state="hidden")
        for number in range(8):
            assert server.predict(number)[0] == 200
        assert server.predict(1, deadline_ms=5)[0] == 503
        shown = playwright.expect
        shown(page.locator("#met")).to_have_text("88.89 %", timeout=10_000)  # 8 of 9
        shown(page.locator("#gpus")).to_have_text("2")
        shown(page.locator("#busy")).to_have_text("0", timeout=10_000)
        shown(page.locator("#waiting")).to_have_text("0")
        shown(page.locator("#batch")).to_have_text("1.0")
        assert page.locator("#rates polyline").count() == 1
        assert page.locator("#batches rect").count() == 1
        assert not page.locator("#language").is_visible()
        assert errors == []
        browser.close()
