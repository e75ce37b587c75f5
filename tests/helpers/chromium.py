"""A headless Chromium for the tests of pages, and checks of what it shows.

Needs Chromium and its driver (`apt-get install chromium chromium-driver`) and the Python package selenium (extra
`test`). Without them these tests are skipped; they fail if the environment variable `CI` is set.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FOUND = {"selenium": find_spec("selenium"), "Chromium": BINARY, "chromedriver": DRIVER}
MISSING = ", ".join(name for name, path in FOUND.items() if not path)
HINT = (
    f"without {MISSING}; to run the tests of the pages: apt-get install chromium chromium-driver; "
    "pip install -e '.[test]'"
)
if MISSING and not os.environ.get("CI"):
    pytest.skip(HINT, allow_module_level=True)

# Elements that reach out of the window, or whose text is cut, unless they scroll by themselves.
OVERFLOWING = """
const cut = [];
const scrolls = e => e.closest('.scroll') !== null;
for (const e of document.querySelectorAll('body, body *')) {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  if (box.width === 0 || e.closest('.heard') || scrolls(e) && !e.matches('.scroll')) continue;
  if (box.right > innerWidth + 1 || box.left < -1) cut.push(['outside', e.outerHTML.slice(0, 120)]);
  if (!e.matches('.scroll') && !e.closest('svg') && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
      && style.display !== 'inline') cut.push(['cut', e.outerHTML.slice(0, 120)]);
}
return cut;
"""

# Text whose contrast with what lies behind it is below WCAG 2.2 AA (4.5 to 1), with the contrast.
FAINT = """
const numbers = c => (c.match(/[\\d.]+/g) || []).map(Number);
const linear = v => v <= 10 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = c.map(linear);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
  if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
const faint = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.tagName === 'title' || e.getBoundingClientRect().width === 0) continue;
  const style = getComputedStyle(e);
  const front = numbers(e.closest('svg') ? style.fill : style.color);
  const [a, b] = [light(front), light(behind(e))].sort((x, y) => y - x);
  const contrast = (a + .05) / (b + .05);
  if (contrast < 4.5) faint.push([e.outerHTML.slice(0, 100), contrast]);
}
return faint;
"""


@contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """Run a headless Chromium with an empty profile."""
    if MISSING:
        pytest.fail(HINT, pytrace=False)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    options = webdriver.ChromeOptions()
    options.binary_location = BINARY
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield started
    finally:
        started.quit()


def emulate(browser: Any, width: int, scheme: str) -> None:
    """Set the width of the window and the colour scheme that the user prefers, and forget earlier messages."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance")
    browser.get_log("browser")


def requested(browser: Any) -> list[str]:
    """Return the addresses requested since the last call, apart from those of the browser's own pages."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "chrome:", "chrome-untrusted:"))]
