"""A comparison as one HTML page that needs nothing else: no script, no font, no network.

Everything that comes from outside (questions, answers, names) is escaped by the template, and the
page forbids itself scripts and connections.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from jinja2 import Environment, PackageLoader, StrictUndefined

from prumerge_fast.cli import report
from prumerge_fast.cli.chart import Point, Series, chart
from prumerge_fast.cli.pictures import Grid, data_uri, look
from prumerge_fast.errors import InputError
from prumerge_fast.harness.answers import normalise
from prumerge_fast.harness.files import NO_ROOM, write_whole
from prumerge_fast.harness.models import Loaded
from prumerge_fast.reduction.config import PruMergeConfig

MOST_QUESTIONS = 24  # with pictures; they are what makes the page large
PANEL = 336  # pixels of a picture's side
OUTLINES = {"prumerge": "#6db7f0", "prumerge-plus": "#4fd0a5"}  # as the style sheet's, on black


@dataclass(frozen=True)
class Panel:
    """A picture as one policy uses it. `kept` is `None` where all `patches` are used.

    Several crops or frames are one picture of another `height` than `side`, its width.
    """

    address: str
    side: int
    patches: int
    tokens: int
    kept: int | None
    height: int | None = None


@contextmanager
def writable(path: Path, option: str = "--html") -> Iterator[TextIO]:
    """Opens the page's file before there is a page; what it holds stays until `write`.

    Args:
        path: Of the page.
        option: That gave the path, for the error.

    Raises:
        InputError: The file cannot be written, or its name does not end in .html.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{option}: expected a name that ends in .html, got {path}")
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names may hold what UTF-8 cannot.
        file = path.open("a", encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{option}: expected a writable file, got {path} ({error})") from None
    try:
        with file:
            yield file
    finally:
        if new and path.stat().st_size == 0:  # nothing came of it
            path.unlink()


def write(file: TextIO, content: str) -> None:
    """Puts a page in the place of what the file holds: whole or not at all, where the folder takes
    a second file.

    Raises:
        InputError: There is no room for it.
    """
    path = Path(file.name)
    file.close()  # or Windows would not replace it
    try:
        try:
            write_whole(path, content, errors="replace")
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            path.write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"expected room for the page {path}, got {error}") from None


def panels(
    loaded: Loaded,
    run: Mapping[str, Any],
    picture: Callable[[str, str], Any],
    *,
    backend: str = "auto",
) -> dict[tuple[str, str], dict[str, Panel]]:
    """The pictures of the questions that the page shows, by name and modality, and by policy.

    Args:
        loaded: The model of the run.
        run: What `compare --json` prints.
        picture: Gives an image of the run, or the frames of a video, by its name and modality.
        backend: Of `prune_merge`.

    Raises:
        InputError: An image cannot be read any more.
    """
    configs = {
        policy: PruMergeConfig(**row["config"])
        for policy, row in run["results"].items()
        if row["config"] is not None
    }
    drawn: dict[tuple[str, str], dict[str, Panel]] = {}
    shown = run["answers"][:MOST_QUESTIONS]
    for name, modality in dict.fromkeys(map(_picture_of, shown)):
        content = picture(name, modality)
        seen = look(loaded, content, name, configs, backend=backend, modality=modality)
        panel = PANEL if len(seen.views) == 1 else PANEL // 3
        views = [seen.views[number] for number in seen.drawn()]
        grids = [Grid(view.image, view.cells, panel, view.joined) for view in views]
        patches = sum(len(view.patches) for view in seen.views)
        drawn[name, modality] = {}
        for policy in run["results"]:
            tiles = [
                grid.outlined(view.kept[policy], OUTLINES[report.SLUGS[policy]])
                if policy in configs
                else grid.image
                for grid, view in zip(grids, views, strict=True)
            ]
            whole = seen.arranged(
                [grid.final(tile) for grid, tile in zip(grids, tiles, strict=True)]
            )
            kept = sum(len(view.kept[policy]) for view in seen.views) if policy in configs else None
            tokens = seen.tokens.get(policy, seen.all_tokens)
            drawn[name, modality][policy] = Panel(
                data_uri(whole), whole.width, patches, tokens, kept, whole.height
            )
    return drawn


def _picture_of(answer: Mapping[str, Any]) -> tuple[str, str]:
    """The name and modality of what was asked about; earlier versions asked about images only."""
    return answer["image"], answer.get("modality", "image")


def render(
    run: Mapping[str, Any],
    pictures: Mapping[tuple[str, str], Mapping[str, Panel]],
    curves: Sequence[Series] | None = None,
    curves_note: str = "",
) -> str:
    """The page.

    Args:
        run: What `compare --json` prints.
        pictures: From `panels`.
        curves: What the plot shows in place of the run's own policies.
        curves_note: Where the curves come from, one sentence.
    """
    environment = Environment(
        loader=PackageLoader("prumerge_fast.cli", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": _milliseconds}
    return environment.get_template("page.html.jinja").render(
        run=run,
        slugs=report.SLUGS,
        tiles=_tiles(run["results"]),
        rows=report.comparison_rows(run["results"]),
        earlier=run.get("answered_by_earlier_runs", 0),
        failed=run.get("failed", []),
        bars=_bars(run["results"]),
        plot=chart(curves or _own_points(run["results"])),
        measure=_measure(run["results"])[1],
        curves_note=curves_note,
        cards=_cards(run, pictures),
        shown=min(len(run["answers"]), MOST_QUESTIONS),
        facts=_facts(run),
        command=[shlex.quote(argument) for argument in run["command"]],
    )


def _milliseconds(time: float) -> str:
    """Three significant digits, whole milliseconds at least."""
    return f"{time:.2f}" if time < 10 else f"{time:.1f}" if time < 100 else f"{time:,.0f}"


def _measure(results: Mapping[str, Any]) -> tuple[str, str]:
    """What is compared, and its name: answers are not always known."""
    if next(iter(results.values()))["accuracy"] is None:
        return "agreement", "same answer as LLaVA"
    return "accuracy", "accuracy"


def _tiles(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline figures of each policy, and how they stand to the first one's."""
    plain = next(iter(results.values()))
    key, measure = _measure(results)

    def figure(value: str, unit: str, beside: str) -> dict[str, str]:
        return {"value": value, "unit": unit, "beside": beside}

    tiles = []
    for policy, row in results.items():
        is_plain = row is plain
        tokens, total = row["visual_tokens"]["mean"], row["milliseconds"]["total"]
        share = tokens / plain["visual_tokens"]["mean"]
        plain_total = plain["milliseconds"]["total"]
        times_as_long = f"{total / plain_total:.2f} ×" if total and plain_total else ""
        cache = row["kv_cache_bytes"] / plain["kv_cache_bytes"]
        points = 100 * (row[key] - plain[key])
        tiles.append(
            {
                "policy": policy,
                "tokens": f"{tokens:.1f}",
                "share": "" if is_plain else f"{share:.0%} of LLaVA’s",
                "figures": {
                    "whole answer": figure(
                        _milliseconds(total) if total else "–",
                        "ms" if total else "",
                        "" if is_plain else times_as_long,
                    ),
                    "KV cache": figure(
                        f"{row['kv_cache_bytes'] / 1024:,.0f}",
                        "KiB",
                        "" if is_plain else f"{cache:.2f} ×",
                    ),
                    measure: figure(
                        f"{row[key]:.1%}",
                        "",
                        "" if is_plain else f"{points:+.1f} points".replace("-", "−"),
                    ),
                },
            }
        )
    return tiles


def _bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of each policy; widths in percent of the longest bar."""
    names = [stage for stage in report.stages_of(results) if stage != "total"]
    bars: list[dict[str, Any]] = []
    for policy, row in results.items():
        times = {stage: row["milliseconds"][stage] or 0.0 for stage in names}
        total = row["milliseconds"]["total"]
        if total is None:  # all its answers were on file
            continue
        rest = max(total - sum(times.values()), 0.0)
        parts = [
            {"label": report.STAGES[stage], "ms": times[stage], "shade": 100 - 72 * n // len(names)}
            for n, stage in enumerate(names)
            if row["milliseconds"][stage] is not None
        ]
        parts.append({"label": "rest of generate()", "ms": rest, "shade": 12})
        bars.append({"policy": policy, "total": total, "parts": parts})
    longest = max((sum(part["ms"] for part in bar["parts"]) for bar in bars), default=0.0)
    for bar in bars:
        for part in bar["parts"]:
            part["width"] = round(100 * part["ms"] / longest, 2)
    return bars


def _own_points(results: Mapping[str, Any]) -> list[Series]:
    key, _ = _measure(results)
    return [
        Series(policy, report.SLUGS[policy], [Point(row["visual_tokens"]["mean"], row[key])])
        for policy, row in results.items()
    ]


def _cards(
    run: Mapping[str, Any], pictures: Mapping[tuple[str, str], Mapping[str, Panel]]
) -> list[dict[str, Any]]:
    """Questions that follow each other about one image share a card."""
    return [
        {
            "name": Path(picture[0]).name,
            "panels": pictures[picture],
            "questions": [
                {**answer, "verdicts": _verdicts(answer["answers"], answer["expected"])}
                for answer in answers
            ],
        }
        for picture, answers in groupby(run["answers"][:MOST_QUESTIONS], key=_picture_of)
    ]


def _verdicts(answers: Mapping[str, str], expected: str | None) -> dict[str, str]:
    """By policy: "right" or "wrong"; where no answer is known, "same" as LLaVA's or "differs"."""
    first = next(iter(answers.values()))
    yes, no = ("same", "differs") if expected is None else ("right", "wrong")
    wanted = normalise(first if expected is None else expected)
    found = {policy: yes if normalise(text) == wanted else no for policy, text in answers.items()}
    return found | ({next(iter(answers)): ""} if expected is None else {})


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    settings, machine = run["settings"], run["machine"]
    on_gpu = machine["device"] != "cpu"
    return {
        "model": run["model"],
        "questions": f"{run['questions']:,}",
        "precision": settings["dtype"]
        + (f", language model in {settings['bits']} bits" if settings["bits"] else ""),
        "backend": settings["backend"],
        "batch size": str(settings["batch_size"]),
        "longest answer": f"{settings['max_new_tokens']} tokens",
        "timed runs": str(settings["repeat"]),
        "device": machine["device"] if on_gpu else f"{machine['processor']}, CPU",
        "threads": f"{machine['threads']} of {machine['cpus']} CPUs",
        "system": machine["platform"],
        "versions": ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v is not None),
        "date": f"{run['date'][:16].replace('T', ' ')} UTC",
    }
