"""Writes the page of `prumerge-fast compare --html` from the committed result files.

    python bench/report.py                                  # report.html
    python bench/report.py --screenshot docs/report.png     # and an excerpt; needs Chromium

The demo scenes are drawn anew, and the demo model says again which of their patches it keeps; all
figures are those of the files. The plot shows the curves of `prumerge-fast evaluate`. The
screenshot carries the checksum of the comparison that it shows, for a test to compare.
"""

from __future__ import annotations

import script

if __name__ == "__main__":
    script.interruptible()

import hashlib
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prumerge_fast.cli import page
from prumerge_fast.cli.chart import Point, Series
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import image_by_name
from prumerge_fast.errors import InputError
from prumerge_fast.harness.models import load

RESULTS = Path(__file__).parent / "results"
CURVES = {  # method: whose colour, dashes
    "random": ("other", "1 4"),
    "evenly spaced": ("other", "8 4"),
    "attention top-k": ("other", ""),
    "PruMerge": ("prumerge", ""),
    "PruMerge, raster order": ("prumerge", "6 4"),
    "PruMerge+": ("prumerge-plus", ""),
    "PruMerge+, raster order": ("prumerge-plus", "6 4"),
}
EXCERPT = """
section:not([aria-labelledby=stages], [aria-labelledby=answers]), article:nth-child(n+5) {
  display: none;
}
"""
POINTS = {
    "all tokens": "llava",
    "PruMerge, adaptive": "prumerge",
    "PruMerge+, adaptive": "prumerge-plus",
}


def curves(run: dict[str, Any]) -> list[Series]:
    """What `prumerge-fast evaluate` measured: methods at equal budgets, and adaptive ones."""

    def point(name: str) -> Point:
        row = run["policies"][name]
        overall = row["accuracy"]["overall"]
        return Point(row["visual_tokens"], overall["value"], tuple(overall["interval"]))

    return [
        *(Series(name, slug, [point(name)]) for name, slug in POINTS.items()),
        *(
            Series(name, slug, [point(f"{name} ({n})") for n in run["settings"]["tokens"]], dash)
            for name, (slug, dash) in CURVES.items()
        ),
    ]


def note(run: dict[str, Any]) -> str:
    """Where the curves come from."""
    return (
        f"{run['questions']['overall']:,} questions, {run['bootstrap']['level']:.0%} bootstrap "
        f"intervals over {run['bootstrap']['over']}: {' '.join(run['command'])}, "
        f"{run['date'][:10]}. Visual tokens are on a logarithmic scale."
    )


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's Chromium without a screen, driven by playwright.

    Raises:
        InputError: There is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        raise InputError(f"--screenshot: expected {' or '.join(names)} on the PATH, got none")
    silent = ("background-networking", "component-update", "sync", "gpu")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{one}" for one in silent)],
        )
        yield chromium
        chromium.close()


def screenshot(source: Path, output: Path, checksum: str) -> None:
    """The page's summary, stages and first four questions as a PNG."""
    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": 1120, "height": 800})
        tab.goto(source.resolve().as_uri())
        tab.add_style_tag(content=EXCERPT)
        picture = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
    note = PngInfo()
    note.add_text("Results", checksum)
    picture.convert("RGB").quantize(256, kmeans=1).save(output, optimize=True, pnginfo=note)


def main(arguments: list[str] | None = None) -> None:
    """Writes the page, and the excerpt if it is asked for.

    Raises:
        InputError: Something given cannot be used.
    """
    parser = script.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", type=Path, default=RESULTS / "demo-compare.json")
    parser.add_argument("--accuracy", type=Path, default=RESULTS / "demo-accuracy.json")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--screenshot", type=Path, help="a PNG")
    options = parser.parse_args(arguments)
    run = script.read_result("--compare", options.compare)
    accuracy = script.read_result("--accuracy", options.accuracy)
    with script.taking_apart("--accuracy", options.accuracy):
        plot = curves(accuracy), note(accuracy)
    with page.writable(options.output, "--output") as file:
        with script.taking_apart("--compare", options.compare):
            loaded = load(MODEL_DIR, dtype=run["settings"]["dtype"], device="cpu")
            pictures = page.panels(loaded, run, lambda name, _: image_by_name(name))
            content = page.render(run, pictures, *plot)
        page.write(file, content)
    if options.screenshot:
        checksum = hashlib.sha256(options.compare.read_bytes()).hexdigest()
        screenshot(options.output, options.screenshot, checksum)


if __name__ == "__main__":
    script.run(main)
