"""`evaluate`: accuracy with intervals, as tables, as JSON and in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from prumerge_fast.cli import report
from prumerge_fast.errors import InputError
from prumerge_fast.evaluation import metrics, stored
from prumerge_fast.evaluation.run import OVERALL, EvaluationOptions
from prumerge_fast.evaluation.run import run as evaluate
from prumerge_fast.harness.answers import failures_line
from prumerge_fast.harness.files import write_whole


def run(options: EvaluationOptions) -> None:
    """Runs the command.

    Raises:
        InputError: Something given cannot be used, or, at the end, some pictures could not. Answers
            written until then stay.
    """
    result = evaluate(options, report.progress)
    if options.as_json:
        report.print_json(result)
    else:
        for table in _tables(result):
            report.console().print(table)
        for remark in report.remarks(result):
            report.console().print(remark, soft_wrap=True)
    if options.output is not None:
        _write(options.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if result["failed"]:
        raise InputError(failures_line(result["pictures"], result["failed"]))


def _write(output: Path, text: str) -> None:
    try:
        # File names may hold what UTF-8 cannot; JSON reads the escapes.
        write_whole(output, text, errors="backslashreplace")
    except OSError as error:
        raise InputError(
            f"--output: expected a writable file, got {output} ({error}); the answers stay in "
            f"{stored.answers_file(output)}, and the same command goes on from them"
        ) from None


def _tables(result: dict[str, Any]) -> list[Table]:
    """Exact match and, where there are questions of that sort, POPE's measures."""
    kinds = result["questions"]

    def exact(row: dict[str, Any]) -> list[str]:
        overall, *others = (row["accuracy"][kind] for kind in kinds)
        return [_with_interval(overall), *map(_share, others)]

    tables = [
        _table(
            result,
            f"{result['model']}: exact match, with its 95 % interval over images",
            [f"{kind} ({n})" for kind, n in kinds.items()],
            exact,
        )
    ]
    of_kinds = result["yes_no_by_kind"]
    if len(of_kinds) == 1:  # their mean is that of one
        of_kinds = {}

    def pope(row: dict[str, Any]) -> list[str]:
        f1 = [row["pope_by_kind"][kind]["f1"] for kind in of_kinds]
        mean = [_with_interval(row["pope_mean_f1"])] if of_kinds else []
        return [*map(_share, [*row["pope"].values(), *f1]), *mean]

    if result["yes_no_questions"]:
        headings = [measure.replace("_", "-") for measure in metrics.POPE_MEASURES]
        headings += [f"f1 {kind} ({n})" for kind, n in of_kinds.items()]
        title = f"{result['model']}: POPE's measures of {result['yes_no_questions']} questions"
        tables.append(_table(result, title, headings + ["mean f1"] * bool(of_kinds), pope))
    answered = result["answered"]
    if answered["by_earlier_runs"]:
        tables[-1].caption = (
            f"{answered['by_earlier_runs']} of {kinds[OVERALL]} questions were answered by an "
            f"earlier run, all between {answered['first']} and {answered['last']}"
        )
        tables[-1].caption_justify = "left"
    return tables


def _table(
    result: dict[str, Any],
    title: str,
    headings: Sequence[str],
    cells: Callable[[dict[str, Any]], list[str]],
) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("policy", "tokens", *headings):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    budget: int | None = None
    for name, row in result["policies"].items():
        if row["budget"] != budget and table.rows:
            table.rows[-1].end_section = True
        budget = row["budget"]
        table.add_row(name, f"{row['visual_tokens']:.1f}", *cells(row))
    return table


def _share(entry: dict[str, Any]) -> str:
    return "–" if entry["value"] is None else f"{entry['value']:.1%}"


def _with_interval(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return _share(entry)
    low, high = entry["interval"]
    return f"{_share(entry)} ({low:.1%}–{high:.1%})"
