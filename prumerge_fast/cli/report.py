"""Results: sums them up, prints them as tables or JSON, and says where they come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import string
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prumerge_fast.cli.inputs import Item
from prumerge_fast.cli.stages import StageTimes

PACKAGES = (
    *("prumerge_fast", "torch", "transformers", "triton"),
    *("bitsandbytes", "accelerate", "peft"),
)
SLUGS = {"LLaVA": "llava", "PruMerge": "prumerge", "PruMerge+": "prumerge-plus"}
STAGES = {
    "vision": "vision tower",
    "prune_merge": "prune+merge",
    "projector": "projector",
    "prefill": "prefill",
    "decode": "decode",
    "total": "total",
}


@dataclass(frozen=True)
class Answer:
    """What one policy said to one question. `cache_bytes` is its share of the batch's KV cache."""

    item: Item
    text: str
    visual_tokens: int
    cache_bytes: float


def normalise(answer: str) -> str:
    """An answer as it is compared.

    Lower case, single spaces, no punctuation and no quotes at either end, no leading article.
    """
    words = answer.lower().strip(string.punctuation + string.whitespace).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def summarise(
    answers: Sequence[Answer], times: Sequence[StageTimes], baseline: Sequence[Answer]
) -> dict[str, Any]:
    """One policy's row of results.

    Args:
        answers: To all questions.
        times: Seconds per question, one entry for each timed batch.
        baseline: The unpruned model's answers, in the same order.

    Returns:
        `visual_tokens` (mean, min, max of an image), `milliseconds` (median per question, by
        stage; `None` for a stage that does not exist), `kv_cache_bytes` (mean per question),
        `agreement` with the baseline and `accuracy` (overall and by category; `None` and empty
        where no answers are known), both as shares of 1 after `normalise`.
    """
    tokens = [answer.visual_tokens for answer in answers]
    agreeing = [
        normalise(answer.text) == normalise(other.text)
        for answer, other in zip(answers, baseline, strict=True)
    ]
    correct: dict[str | None, list[bool]] = {}
    for answer in answers:
        if answer.item.expected is not None:
            right = normalise(answer.text) == normalise(answer.item.expected)
            correct.setdefault(None, []).append(right)
            if answer.item.category is not None:
                correct.setdefault(answer.item.category, []).append(right)
    accuracy = {category: statistics.fmean(right) for category, right in correct.items()}
    return {
        "visual_tokens": {
            "mean": statistics.fmean(tokens),
            "min": min(tokens),
            "max": max(tokens),
        },
        "milliseconds": {stage: _median_ms(times, stage) for stage in STAGES},
        "kv_cache_bytes": statistics.fmean(answer.cache_bytes for answer in answers),
        "agreement": statistics.fmean(agreeing),
        "accuracy": accuracy.pop(None, None),
        "accuracy_by_category": accuracy,
    }


def _median_ms(times: Sequence[StageTimes], stage: str) -> float | None:
    seconds = [asdict(entry)[stage] for entry in times]
    return None if None in seconds else 1000 * statistics.median(seconds)


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


def answers_table(answers: dict[str, list[Answer]]) -> Table:
    """Every question with what each policy answered."""
    table = Table(title="Answers", title_justify="left", show_lines=True)
    for heading in ("image", "question", *answers):
        table.add_column(heading, overflow="fold")
    for said in zip(*answers.values(), strict=True):
        item = said[0].item
        table.add_row(Path(item.image).name, item.text, *(answer.text for answer in said))
    return table


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def provenance(command: list[str], device: torch.device) -> dict[str, Any]:
    """What made a result: command, versions, machine and date."""
    return {
        "command": ["prumerge-fast", *command],
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


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
