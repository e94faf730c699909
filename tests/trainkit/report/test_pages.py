"""The pages in a browser: no violation of accessibility, no request, no scroll sideways, hover and keyboard."""

import math
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainkit.cli._main import main
from trainkit.cli._switch_metrics import served
from trainkit.report import Run, report
from trainkit.switchml import SoftwareSwitch

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def _axe() -> Path | None:
    npm = shutil.which("npm")
    if npm is None:
        return None
    folder = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False).stdout.strip()
    path = Path(folder) / "axe-core" / "axe.min.js"
    return path if path.exists() else None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a network of its own making."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'playwright>=1.50'")
    if CHROMIUM is None:
        pytest.skip("needs chromium on PATH")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    steps = list(range(1, 2001))
    search = {
        "trials": [
            {"stage": 0, "rate": 10.0**-power, "start": 0, "steps": 20, "losses": [2.0, 1.9], "loss_steps": [0, 20],
             "horizon": 2000, "mean": 1.0, "std": 0.1, "status": status}
            for power, status in ((2, "committed"), (3, "finished"), (1, "diverged"), (4, "stopped"))
        ],
        "searches": [{"reason": "as many rates were tried as it may try"}],
        "discarded_steps": 60, "extra_forwards": 4, "search_seconds": 2.0,
    }  # fmt: skip
    flat = {
        "forward_s": 0.01,
        "backward_s": 0.02,
        "network_s": 0.004,
        "optimizer_s": 0.001,
        "step_s": 0.035,
        "rate": 1e-2,
    }
    loss = [3 * s**-0.3 for s in steps]
    held_out = [value if s % 200 == 0 else math.nan for s, value in zip(steps, loss, strict=True)]
    sent = [1e6 * s for s in steps]
    columns = {
        "step": steps, "loss": loss, "val_loss": held_out, "sent_bytes": sent, "received_bytes": sent,
        **{name: [value] * len(steps) for name, value in flat.items()},
    }  # fmt: skip
    one = Run(
        name="ours", started="2026-11-30T12:00:00+00:00", seconds=70.0, command="python train.py", columns=columns,
        environment={"Python": "3.12"}, settings={"ranks": 2}, results={"last val_loss": 0.3}, search=search,
        counters={"sent_bytes": 2e9}, links={"a→b": 1e9, "b→a": 2e9},
    )  # fmt: skip
    other = Run(name="theirs", columns={**columns, "rate": [1e-3] * 2000})
    (folder / "run.html").write_text(report([one, other]))
    assert (
        main(
            ["plan", "--topology", str(ROOT / "examples/forest_two_islands.json"), "--html", str(folder / "plan.html")]
        )
        == 0
    )
    find = ["topology", "find", "--nodes", "8", "--degree", "2", "--seconds", "2", "--html", str(folder / "find.html")]
    assert main(find) == 0
    return {name: folder / f"{name}.html" for name in ("run", "plan", "find")}


@pytest.mark.parametrize("name", ["run", "plan", "find"])
def test_a_page_is_fit_for_everybody(browser: Any, pages: dict[str, Path], name: str) -> None:
    axe = _axe()
    for scheme in ("light", "dark"):
        for width in (360, 820, 1440):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said: list[str] = []
            asked: list[str] = []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("pageerror", lambda error, said=said: said.append(str(error)))
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto(f"file://{pages[name]}")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
            if axe is not None:
                tab.evaluate(axe.read_text())
                found = tab.evaluate("axe.run().then(r => r.violations.map(v => v.id + ': ' + v.nodes[0].html))")
                assert found == []
            assert said == []
            tab.close()
    if axe is None:
        pytest.skip("the rest passed; accessibility needs axe-core: npm install -g axe-core")


def test_the_cursor_tells_the_runs_numbers(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page(viewport={"width": 820, "height": 900})
    tab.goto(f"file://{pages['run']}")
    loss = tab.locator("figure.chart").first
    loss.locator(".cursor").hover(position={"x": 5, "y": 20})
    assert "ours, training" in loss.locator("output").inner_text()
    loss.locator(".cursor").focus()
    tab.keyboard.press("End")
    said = loss.locator("output").inner_text()
    assert f"{3 * 2000**-0.3:.4g}" in said and "2000" in said
    tab.keyboard.press("Home")
    assert "optimiser step 1:" in loss.locator("output").inner_text()
    tab.close()


def test_a_trial_tells_what_became_of_it(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    tab.goto(f"file://{pages['run']}")
    rates = tab.locator("figure.chart", has=tab.locator("figcaption", has_text="Learning rate")).first
    assert rates.locator("button.mark").count() == 4
    rates.locator("button.mark").first.focus()
    assert "rate 0.01, 20 steps, its steps were kept" in rates.locator("output").inner_text()
    tab.keyboard.press("Tab")
    assert "rate 0.001, 20 steps, not chosen" in rates.locator("output").inner_text()
    tab.close()


def test_the_switchs_page_follows_its_counters(browser: Any) -> None:
    """And text of strangers stays text."""
    axe = _axe()
    with socket.create_server(("127.0.0.1", 0)) as one:
        address = one.getsockname()
    with SoftwareSwitch() as switch, served(switch, address):
        tab = browser.new_page(viewport={"width": 360, "height": 900})
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.goto(f"http://{address[0]}:{address[1]}/")
        malformed = tab.locator("section.tile", has=tab.get_by_role("heading", name="malformed", exact=True)).locator(
            ".number"
        )
        malformed.get_by_text("0 in all").wait_for()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            host, port = switch.address.rsplit(":", 1)
            stranger.sendto(b"<img src=x>", (host, int(port)))
        malformed.get_by_text("1 in all").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        if axe is not None:
            tab.evaluate(axe.read_text())
            assert tab.evaluate("axe.run().then(r => r.violations.map(v => v.id + ': ' + v.nodes[0].html))") == []
        assert said == []
        tab.close()


def test_trees_and_moments_light_their_links(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    tab.goto(f"file://{pages['plan']}")
    assert tab.locator("line.cut").count() == 8
    tab.locator("select").select_option(index=1)
    assert tab.locator("line.used").count() >= 7 and tab.locator("[data-node].root").count() == 1
    tab.locator("input[type=range]").focus()
    tab.keyboard.press("ArrowRight")
    assert "moment 1 of" in tab.locator(".network output").inner_text()
    assert tab.locator("line.used").count() >= 1
    tab.close()
