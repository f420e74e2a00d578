"""Results as tables or JSON, and how far a command has come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prumerge_fast.harness.answers import STAGES, Answer

MOST_ERRORS_SHOWN = 12
SLUGS = {"LLaVA": "llava", "PruMerge": "prumerge", "PruMerge+": "prumerge-plus"}


@dataclass(frozen=True)
class Row:
    """One line of the comparison, with a cell for each policy."""

    label: str
    cells: list[str]
    ends_section: bool = False


def comparison_rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """The comparison, line by line, from `summarise`'s rows by policy name."""
    policies = list(results.values())
    tokens = [policy["visual_tokens"] for policy in policies]
    rows = [
        Row("visual tokens, mean", [f"{count['mean']:.1f}" for count in tokens]),
        Row("visual tokens, range", [f"{c['min']}–{c['max']}" for c in tokens], ends_section=True),
    ]
    for stage in stages_of(results):
        times = [policy["milliseconds"][stage] for policy in policies]
        cells = ["–" if time is None else f"{time:.2f}" for time in times]
        rows.append(Row(f"{STAGES[stage]}, ms", cells, ends_section=stage == "total"))
    cache = [f"{policy['kv_cache_bytes'] / 1024:,.1f}" for policy in policies]
    rows.append(Row("KV cache, KiB", cache, ends_section=True))
    if policies[0]["accuracy"] is not None:
        rows.append(Row("accuracy", [f"{policy['accuracy']:.1%}" for policy in policies]))
        for category in policies[0]["accuracy_by_category"]:
            shares = [policy["accuracy_by_category"][category] for policy in policies]
            rows.append(Row(f"  {category}", [f"{share:.1%}" for share in shares]))
    agreement = [f"{policy['agreement']:.1%}" for policy in policies]
    return [*rows, Row("same answer as LLaVA", agreement)]


def stages_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """The stages that were timed: files of earlier versions may lack some of `STAGES`."""
    timed = next(iter(results.values()))["milliseconds"]
    return [stage for stage in STAGES if stage in timed]


def comparison_table(results: dict[str, dict[str, Any]]) -> Table:
    """`comparison_rows` as a table with one column for each policy."""
    table = Table()
    table.add_column("")
    for policy in results:
        table.add_column(policy, justify="right")
    for row in comparison_rows(results):
        table.add_row(row.label, *row.cells, end_section=row.ends_section)
    return table


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What has to be said of a comparison beside its figures; nothing of most."""
    said = []
    earlier = result.get("answered_by_earlier_runs", 0)
    if earlier:
        said.append(
            f"{earlier} of {result['questions']} questions were answered by an earlier run: times "
            "are of the others, tokens, memory and answers of all."
        )
    failed = result.get("failed", [])
    if failed:
        said.append(f"Questions left out: {len(failed)}, whose pictures could not be read:")
        errors = list(dict.fromkeys(entry["error"] for entry in failed))
        said += [f"  {error}" for error in errors[:MOST_ERRORS_SHOWN]]
        if len(errors) > MOST_ERRORS_SHOWN:
            said.append(f"  and {len(errors) - MOST_ERRORS_SHOWN} more, which --json names")
    return said


def answers_table(answers: Mapping[str, Sequence[Answer]]) -> Table:
    """Every question with what each policy answered."""
    table = Table(title="Answers", title_justify="left", show_lines=True)
    asked = {answer.item.modality for answer in next(iter(answers.values()))}
    for heading in (" or ".join(sorted(asked)), "question", *answers):
        table.add_column(heading, overflow="fold")
    for said in zip(*answers.values(), strict=True):
        item = said[0].item
        table.add_row(Path(item.image).name, item.text, *(answer.text for answer in said))
    return table


def print_json(result: Any) -> None:
    """Writes a result to standard output as JSON; in ASCII where that is not UTF-8."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(result, indent=2, ensure_ascii=not is_utf8))


def console() -> Console:
    """Standard output, for tables; brackets and colons in answers are no markup."""
    return Console(markup=False, emoji=False, highlight=False)


def messages() -> Console:
    """Standard error, for progress and remarks."""
    return Console(stderr=True)


def remark(text: str) -> None:
    """Writes a line to standard error; names of files are no markup, and may hold line ends."""
    line = " ".join(text.split())
    messages().print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar of questions on standard error, where that is a terminal; what it gives moves it on."""
    console = messages()
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=completed)
        yield lambda count: bar.advance(task, count)
