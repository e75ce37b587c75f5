"""The picture in README.md: the top of the report of a run, up to the end of its path.

    python -m tests.benchmarks.report_picture runs/pocket/seed0

writes docs/report.png. It needs Chromium and its driver (`apt-get install chromium chromium-driver`).
"""

import argparse
import base64
import io
import tempfile
from pathlib import Path

PICTURE = Path(__file__).parents[2] / "docs/report.png"
WIDTH = 1200
COLOURS = 256
"""Enough for text and flat colours; the file is much smaller than one with all colours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run, with its report")
    args = parser.parse_args()
    from PIL import Image

    from tests.helpers.chromium import emulate, open_browser

    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        emulate(browser, WIDTH, "light")
        browser.get((args.run / "report/index.html").resolve().as_uri())
        bottom = browser.execute_script("return document.querySelector('.path').getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": bottom + 20, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {image.width} x {image.height}, {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
