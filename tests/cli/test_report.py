"""The page of `compare --html` and of bench/report.py: what it says, and how a browser shows it."""

from __future__ import annotations

import base64
import errno
import importlib.util
import io
import json
import os
import re
from contextlib import ExitStack
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prumerge_fast.cli import compare, main, page, report
from prumerge_fast.cli.chart import Point, Series, chart
from prumerge_fast.demo.items import image_by_name
from prumerge_fast.errors import InputError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
POLICIES = ["LLaVA", "PruMerge", "PruMerge+"]
SCRIPT = "<script>document.title='owned'</script>"
HOSTILE_NAME = "\"><img src=x onerror=document.title='owned'>.png"
VOID = {"meta", "img", "path"}


@pytest.fixture(scope="session")
def bench_report():
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def from_files(bench_report, tmp_path_factory):
    """The page of the committed results."""
    path = tmp_path_factory.mktemp("bench") / "report.html"
    bench_report.main(["--output", str(path)])
    return path


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """Questions and file names that try to run as scripts, answered by the demo model."""
    folder = tmp_path_factory.mktemp("hostile")
    image_by_name("demo:3").save(folder / HOSTILE_NAME)
    image_by_name("demo:4").save(folder / "b.png")
    records = [
        {"image": HOSTILE_NAME, "text": f"What is this? {SCRIPT}", "answer": "</td>" + SCRIPT},
        {"image": HOSTILE_NAME, "text": "{{ 7 * 7 }} " + "long" * 60, "answer": "red"},
        {"image": "b.png", "text": "Which shape is white?", "category": f"<b>{SCRIPT}"},
    ]
    lines = [json.dumps({"question_id": n, **record}) for n, record in enumerate(records)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    path = folder / "new" / "report.html"
    assert main(["compare", "--questions", f"{folder}/questions.jsonl", "--html", str(path)]) == 0
    return path


class Outline(HTMLParser):
    """The text and the elements of a page; fails on tags that do not match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.starts, self.text = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.starts.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() else []

    def all(self, tag):
        return [attributes for name, attributes in self.starts if name == tag]


def a_run(answers, **fields):
    """The committed run with other answers: lists of (image, question, expected, said)."""
    run = json.loads((RESULTS / "demo-compare.json").read_text())
    entries = [
        {
            "question_id": n,
            "image": image,
            "question": question,
            "expected": expected,
            "category": None,
            "answers": dict(zip(POLICIES, said, strict=True)),
        }
        for n, (image, question, expected, said) in enumerate(answers)
    ]
    return {**run, "answers": entries, "questions": len(entries), **fields}


def rendered(tmp_path, run):
    panel = page.Panel("data:,", 336, 196, 20, 19)
    pictures = {
        (answer["image"], "image"): dict.fromkeys(POLICIES, panel) for answer in run["answers"]
    }
    path = tmp_path / "page.html"
    with page.writable(path) as file:
        page.write(file, page.render(run, pictures))
    return path


def test_html_comes_beside_the_tables(tmp_path, capsys):
    path = tmp_path / "page.html"
    path.write_text("an old page" * 10_000)
    arguments = ["compare", "--count", "3", "--variant", "prumerge", "--html", str(path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "vision tower, ms" in out
    assert out.endswith(f"{path}: the same as a page, with pictures\n")
    content = path.read_text(encoding="utf-8")
    assert content.startswith("<!doctype html>")
    assert content.endswith("</html>")
    assert "old page" not in content
    assert "PruMerge+" not in Outline(path).text
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)  # nothing else is printed
    text = Outline(path).text
    for row in report.comparison_rows(result["results"]):
        assert {row.label.strip(), *row.cells} <= {*text}
    assert {answer["question"] for answer in result["answers"]} <= {*text}
    assert result["versions"]["torch"] in " ".join(text)


@pytest.mark.parametrize("old", ["an old page", None])
def test_a_page_that_does_not_fit_loses_nothing(old, tmp_path, capsys, monkeypatch):
    path = tmp_path / "page.html"
    if old is not None:
        path.write_text(old)

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        arguments = ["compare", "--count", "2", "--json", "--html", str(path)]
        assert main(arguments) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["questions"] == 2
    assert captured.err.startswith("prumerge-fast: expected room for the page ")
    assert captured.err.count("\n") == 1
    assert [(one, one.read_text()) for one in tmp_path.iterdir()] == ([(path, old)] if old else [])


@pytest.mark.parametrize(
    ("name", "says"),
    [("photo.png", r"ends in \.html, got .*photo\.png"), ("is-a-folder.html", "writable file")],
)
def test_bad_files_are_refused_before_the_model_runs(name, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "load", None)
    (tmp_path / "is-a-folder.html").mkdir()
    assert main(["compare", "--html", str(tmp_path / name)]) == 2
    assert re.search(f"^prumerge-fast: --html: expected .*{says}.*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("before", [None, "an old page"])
def test_failure_leaves_what_was_there(before, tmp_path, capsys):
    path = tmp_path / "page.html"
    if before is not None:
        path.write_text(before)
    assert main(["compare", "--keep", "1000", "--html", str(path)]) == 2
    assert (path.read_text() if path.exists() else None) == before


def test_hostile_text_is_only_text(hostile):
    outline = Outline(hostile)
    assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in outline.starts}
    assert all("onerror" not in attributes for _, attributes in outline.starts)
    assert f"What is this? {SCRIPT}" in outline.text
    assert "</td>" + SCRIPT in outline.text
    assert HOSTILE_NAME in outline.text
    assert any("{{ 7 * 7 }}" in text for text in outline.text)
    assert all(image["src"].startswith("data:image/webp;") for image in outline.all("img"))


def test_hostile_answers_and_names_that_utf_8_cannot_hold(tmp_path):
    said = [SCRIPT, "<style>*{display:none}</style>", ""]
    run = a_run([("a\udcff.png", "what?", None, said)], model=SCRIPT, command=["x", SCRIPT])
    path = rendered(tmp_path, run)
    outline = Outline(path)
    assert len(outline.all("style")) == 1
    assert outline.all("script") == []
    assert {*said[:2], "(nothing)", "a?.png"} <= {*outline.text}


def test_number_of_questions_is_bounded_and_said(tmp_path):
    asked = [(f"demo:{n}", f"question {n}", "yes", ["yes"] * 3) for n in range(30)]
    text = Outline(rendered(tmp_path, a_run(asked))).text
    assert f"question {page.MOST_QUESTIONS - 1}" in text
    assert f"question {page.MOST_QUESTIONS}" not in text
    assert any(line.startswith("The first 24 of 30 questions") for line in text)
    text = Outline(rendered(tmp_path, a_run(asked[:5]))).text
    assert any(line.startswith("All 5 questions") for line in text)


def test_pages_stay_small(from_files):
    assert from_files.stat().st_size < 1_500_000
    assert len(Outline(from_files).all("img")) == 3 * page.MOST_QUESTIONS


def test_verdicts(tmp_path):
    asked = [
        ("one.png", "known?", "Red.", ["red", "a red", "blue"]),
        ("one.png", "unknown?", None, ["A cat.", "cat", "dog"]),
    ]
    outline = Outline(rendered(tmp_path, a_run(asked)))
    marks = [pair for pair in pairwise(outline.text) if pair[0] in "✓✗=≠"]
    assert marks == [
        *(("✓", "right"), ("✓", "right"), ("✗", "wrong")),
        *(("=", "LLaVA"), ("≠", "LLaVA")),
    ]
    assert len(outline.all("img")) == 3  # both questions are about one image


def test_pictures_show_what_show_says_is_kept(tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(["compare", "--count", "1", "--html", str(path)]) == 0
    addresses = [image["src"].split(",")[1] for image in Outline(path).all("img")]
    capsys.readouterr()
    for address, variant in zip(addresses[1:], ("prumerge", "prumerge+"), strict=True):
        output = tmp_path / "shown.png"
        assert main(["show", "demo:0", "--variant", variant, "-o", str(output), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert f"{len(shown['kept'])} of 196 patches" in path.read_text()
        assert str(shown["visual_tokens"]) in Outline(path).text

        def patches(data):
            picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
            side = picture.width // 14
            tiles = np.asarray(picture, float).reshape(14, side, 14, side)
            return tiles[:, 6:-6, :, 6:-6].mean((1, 3)).ravel()  # [N], without the outlines

        ratio = patches(address) / patches(addresses[0])
        assert set(np.flatnonzero(ratio > 0.7)) == set(shown["kept"])


def test_bars_add_up_to_the_total():
    results = json.loads((RESULTS / "demo-compare.json").read_text())["results"]
    bars = page._bars(results)
    assert max(sum(part["width"] for part in bar["parts"]) for bar in bars) == pytest.approx(
        100, 0.01
    )
    for bar, row in zip(bars, results.values(), strict=True):
        assert sum(part["ms"] for part in bar["parts"]) == pytest.approx(
            row["milliseconds"]["total"]
        )
        labels = [part["label"] for part in bar["parts"]]
        assert labels == [
            *(
                label
                for stage, label in report.STAGES.items()
                if stage != "total" and row["milliseconds"].get(stage) is not None
            ),
            "rest of generate()",
        ]


def test_chart_places_points():
    curve = Series("a", "other", [Point(16, 0.6, (0.5, 0.7)), Point(64, 1.0, (0.9, 1.0))])
    drawn = chart([curve, Series("b", "llava", [Point(32, 0.75)])])
    (first, last), ((middle, height),) = drawn.places
    assert first[0] == pytest.approx(100 - last[0])
    assert middle == 50
    assert height == 50  # the axis starts at the lowest interval, 50 %
    assert (first[1], last[1]) == (80, 0)
    assert drawn.y_ticks[0] == (0, "100%")
    assert drawn.y_ticks[-1] == (100, "50%")
    assert [label for _, label in drawn.x_ticks] == ["16", "32", "64"]
    assert drawn.lines[1] == drawn.bands[1] == ""
    assert drawn.bands[0].count("L") == 3


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_chart_of_one_value(value):
    drawn = chart([Series("a", "llava", [Point(576, value)])])
    assert 0 <= drawn.places[0][0][1] <= 100
    assert drawn.x_ticks


def test_curves_are_those_of_the_result_file(bench_report, from_files):
    run = json.loads((RESULTS / "demo-accuracy.json").read_text())
    text = Outline(from_files).text
    for series in bench_report.curves(run):
        for point in series.points:
            values = [entry["accuracy"]["overall"]["value"] for entry in run["policies"].values()]
            assert point.value in values
            assert "{:.1%}–{:.1%}".format(*point.interval) in text
    assert len(bench_report.curves(run)) == 10


def test_result_files_that_cannot_be_read(bench_report, tmp_path):
    (tmp_path / "broken.json").write_text('{"results":')
    for option, name in (("--compare", "gone.json"), ("--accuracy", "broken.json")):
        expected = rf"{option}: expected a result file \(JSON\), got .*{name}"
        with pytest.raises(InputError, match=expected):
            bench_report.main([option, str(tmp_path / name)])


@pytest.mark.parametrize("option", ["--compare", "--accuracy"])
@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"results": {}}', "[" * 100_000, "other"])
def test_result_files_of_another_kind(bench_report, tmp_path, option, content):
    path, page_ = tmp_path / "a.json", tmp_path / "report.html"
    if content == "other":
        name = "demo-accuracy" if option == "--compare" else "demo-compare"
        content = (RESULTS / f"{name}.json").read_text()
    path.write_text(content)
    with pytest.raises(InputError, match=rf"{option}: expected a result file .*a\.json"):
        bench_report.main([option, str(path), "--output", str(page_)])
    assert not page_.exists()


def test_output_that_is_no_page(bench_report, tmp_path):
    with pytest.raises(InputError, match=r"--output: expected a name that ends in \.html"):
        bench_report.main(["--output", str(tmp_path / "x.png")])


# In a real browser. Skipped where there is none, unless PRUMERGE_FAST_BROWSER=1 asks for one.

CONTRAST = """() => {
  const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) =>
    0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = element => {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] === 255 ? colour : behind(element.parentElement);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = 21;
  while (texts.nextNode()) {
    if (!texts.currentNode.textContent.trim()) continue;
    const element = texts.currentNode.parentElement;
    const pair = [luminance(rgba(getComputedStyle(element).color)), luminance(behind(element))];
    least = Math.min(least, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05));
  }
  return least;
}"""


@pytest.fixture(scope="session")
def chromium(bench_report):
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(bench_report.browser())
        except (ImportError, InputError) as error:
            if os.environ.get("PRUMERGE_FAST_BROWSER") == "1":
                raise
            pytest.skip(f"no browser: {error}")
        yield browser


@pytest.fixture(params=["from_files", "hostile"])
def path(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def visit(chromium, path):
    """Opens the page and gathers what went wrong in it and what it asked the network for."""
    tabs = []

    def open_page(width, **options):
        tab = chromium.new_page(viewport={"width": width, "height": 800}, **options)
        tabs.append(tab)
        tab.trouble = []
        tab.on("console", lambda message: tab.trouble.append(message.text))
        tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
        tab.on(
            "request",
            lambda request: (
                request.url.startswith("data:image/")
                or request.url == path.as_uri()
                or tab.trouble.append(request.url)
            ),
        )
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for tab in tabs:
        tab.close()


@pytest.mark.parametrize("width", [375, 1280])
def test_browser_shows_the_page(visit, width):
    tab = visit(width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    tab.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    images = tab.locator("img").evaluate_all("all => all.map(one => [one.naturalWidth, one.alt])")
    assert len(images) >= 3
    assert all(size >= 300 and alt for size, alt in images)
    shown = np.asarray(Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB"))
    bands = np.array_split(shown, len(shown) // 400)
    assert all(np.ptp(band) > 100 for band in bands)  # nowhere blank
    assert tab.trouble == []


def test_browser_runs_nothing(visit):
    tab = visit(800)
    assert tab.title().endswith("LLaVA beside PruMerge")
    assert tab.locator("script").count() == 0
    assert tab.trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_text_is_legible(visit, scheme):
    tab = visit(375, color_scheme=scheme)
    paper = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"))[2, 2]
    assert (paper < 64) == (scheme == "dark")
    assert tab.evaluate(CONTRAST) >= 4.5  # WCAG 2.1, level AA
    smallest = "all => Math.min(...all.map(one => parseFloat(getComputedStyle(one).fontSize)))"
    assert tab.locator("body *").evaluate_all(smallest) >= 12  # pixels


def test_browser_sees_headings_and_tables(visit):
    tab = visit(375)
    levels = tab.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for table in tab.get_by_role("table").all():
        assert table.get_by_role("columnheader").count() >= 3
        assert table.get_by_role("rowheader").count() >= 3
    assert tab.get_by_role("img").count() > 3
