"""The page as a browser shows it: on a phone and a desk, in light and dark; nothing sticks out, nothing is fetched."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ara.reporting.gather import gather
from ara.reporting.html import page
from tests.reported import NAME, sources

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEIGHT = 1600
SIZES = {"phone": 390, "desk": 1280}
POLICY = "default-src 'none';"

# Put into a copy of the page: what the browser made of it.
SCRIPT = """
<script>
const violations = [];
addEventListener("securitypolicyviolation", event => violations.push(event.violatedDirective));
addEventListener("load", () => {
  const folded = document.querySelector(".folded"), hidden = folded.getBoundingClientRect().height === 0;
  document.querySelectorAll("details").forEach(details => details.open = true);
  const page = document.documentElement, shown = getComputedStyle(document.body);
  const scrolls = element => element.closest(".scroll") !== null;
  const boxes = [...document.querySelectorAll("body *")].filter(element => !scrolls(element));
  const inside = [...document.querySelectorAll("svg text")];
  parent.document.title = "done";
  parent.document.body.dataset.found = JSON.stringify({
    width: innerWidth,
    unfolds: hidden && folded.getBoundingClientRect().height > 200,
    scrolls: page.scrollWidth,
    wide: boxes.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName).slice(0, 9),
    scrollable: [...document.querySelectorAll(".scroll")].map(e => e.getBoundingClientRect().right <= innerWidth + 1),
    clipped: inside.filter(text => {
      const box = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
      return box.left < frame.left - 2 || box.right > frame.right + 2;
    }).map(text => text.textContent),
    colour: shown.color,
    paper: shown.backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text")).fill,
    headings: [...document.querySelectorAll("h2")].map(heading => heading.textContent),
    marked: [...document.querySelectorAll("tr.marked th")].map(cell => cell.textContent),
    pictures: [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect().width > 200),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    violations: violations,
  });
});
</script>
"""


@pytest.fixture(scope="module")
def browser():
    """Return the path of a browser; skip where there is none."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a headless browser: none of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def text():
    return page(gather(sources()))


def run(browser, folder, *words):
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}/p",
    ]
    result = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def shown(browser, text, folder: Path, width: int, dark: bool):
    """Return what the script has found, and the picture (height, width, 3) with values from 0 to 1."""
    from matplotlib.image import imread

    assert text.count(POLICY) == 1
    probe = text.replace(POLICY, f"{POLICY} script-src 'unsafe-inline';").replace("</title>", f"</title>{SCRIPT}")
    # A window of a headless browser is at least 500 wide; a frame is as wide as it is told.
    frame = f'<iframe style="border:0;width:{width}px;height:{HEIGHT}px" srcdoc="{html.escape(probe)}"></iframe>'
    outer, picture = folder / "frame.html", folder / "page.png"
    outer.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{frame}</body>', encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    words = [f"--window-size={max(width, 500)},{HEIGHT}", scheme, f"--screenshot={picture}", "--dump-dom"]
    dom = run(browser, folder, *words, outer.as_uri())
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None
    return json.loads(html.unescape(found[1])), imread(picture)[:, :width, :3]


def brightness(colour: str) -> float:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 765


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_in_a_browser(browser, text, tmp_path, size, dark):
    found, picture = shown(browser, text, tmp_path, SIZES[size], dark)
    assert found["width"] == SIZES[size]
    assert found["unfolds"]  # all layers are shown by a click
    # Nothing wider than the page: tables scroll in places of their own.
    assert found["scrolls"] <= found["width"] and found["wide"] == []
    assert found["scrollable"] and all(found["scrollable"])
    assert found["clipped"] == [] and all(found["pictures"]) and len(found["pictures"]) == 6
    assert found["headings"][0] == "Size" and len(found["headings"]) == 11
    assert NAME in found["marked"]
    # Nothing is fetched, and nothing was tried that the policy forbids.
    assert found["violations"] == []
    assert [name for name in found["fetched"] if not name.startswith("data:")] == []
    # Readable: ink and paper are far apart, in pictures too.
    paper, ink, drawn = (brightness(found[key]) for key in ("paper", "colour", "ink"))
    assert (paper < 0.2 and min(ink, drawn) > 0.8) if dark else (paper > 0.9 and max(ink, drawn) < 0.25)
    # The picture is not blank, and has the paper that was asked for.
    assert picture.shape[1] == SIZES[size]
    grey = picture.mean(-1)
    assert abs(np.median(grey) - paper) < 0.05
    assert 0.005 < (abs(grey - paper) > 0.3).mean() < 0.5


def test_the_page_on_paper(browser, text, tmp_path):
    """Printed in the dark, it is dark ink on white, with links spelled out and no table behind the edge."""
    path, script = (
        tmp_path / "page.html",
        """
<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  document.body.dataset.found = JSON.stringify({
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    link: getComputedStyle(document.querySelector("footer a"), "::after").content,
    wide: [...document.querySelectorAll("table")].filter(e => e.getBoundingClientRect().right > width + 1).length,
    scroll: getComputedStyle(document.querySelector(".scroll")).overflowX,
    folded: document.querySelector(".folded table").getBoundingClientRect().height,
  });
});
</script>
""",
    )
    # As the style sheet of paper, at the width of A4 less its margins.
    printed = text.replace("@media print", "@media screen").replace(POLICY, f"{POLICY} script-src 'unsafe-inline';")
    path.write_text(printed.replace("</title>", f"</title>{script}"), encoding="utf-8")
    dark = "--blink-settings=preferredColorScheme=0"
    dom = run(browser, tmp_path, "--window-size=680,1000", dark, "--dump-dom", path.as_uri())
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert brightness(found["paper"]) == 1 and brightness(found["ink"]) == 0
    assert "attr(href)" in found["link"] or "arxiv.org" in found["link"]
    assert found["scroll"] == "visible" and found["wide"] == 0
    assert found["folded"] > 200  # all layers, though nobody has opened them
    pdf = tmp_path / "page.pdf"
    (tmp_path / "plain.html").write_text(text, encoding="utf-8")
    run(browser, tmp_path, f"--print-to-pdf={pdf}", (tmp_path / "plain.html").as_uri())
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 50_000
