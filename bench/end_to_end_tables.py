"""The tables of `end_to_end.py`, for the terminal and for docs/end-to-end.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

QUANTITIES = (
    *("visual tokens", "preprocessing, ms", "vision tower, ms", "prune+merge, ms"),
    *("projector, ms", "prefill, ms", "decode, ms a token", "first token, ms"),
    *("prefill, times faster", "first token, times faster", "KV cache, MiB", "peak memory, MiB"),
)


def summary(result: dict[str, Any]) -> Group:
    """For the terminal."""
    tables = []
    for title, policies, lines in _groups(result):
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for policy in policies:
            table.add_column(policy, justify="right")
        for quantity, cells in lines:
            table.add_row(quantity, *cells)
        tables.append(table)
    return Group(*tables, _remark(result))


def markdown(result: dict[str, Any]) -> str:
    """For the documents."""
    text: list[str] = []
    for title, policies, lines in _groups(result):
        text += [f"**{title}**", "", f"| | {' | '.join(policies)} |"]
        text.append("|---|" + "---:|" * len(policies))
        text += [f"| {quantity} | {' | '.join(cells)} |" for quantity, cells in lines]
        text.append("")
    return "\n".join([*text, _remark(result)])


def _remark(result: dict[str, Any]) -> str:
    return (
        f"Medians of {result['settings']['rounds']} rounds, times of a whole batch; ratios are to "
        "LLaVA in the same round, with their quartiles. Peak memory: PyTorch's on a GPU, "
        "else the whole process's, weights included."
    )


# A title, the policies, and a cell for each of them by quantity.
_Table = tuple[str, list[str], list[tuple[str, tuple[str, ...]]]]


def _groups(result: dict[str, Any]) -> Iterator[_Table]:
    names = ("model", "precision", "batch_size", "decoder_layers", "of_layers")
    for key, rows in itertools.groupby(result["rows"], lambda row: [row[name] for name in names]):
        model, precision, batch, layers, of_layers = key
        title = f"{model}, {precision}, batch of {batch}, {layers} of {of_layers} decoder layers"
        found = list(rows)
        columns = zip(*map(_cells, found), strict=True)
        policies = [row["policy"].removeprefix("PruMerge, ") for row in found]
        yield title, policies, list(zip(QUANTITIES, columns, strict=True))


def _cells(row: dict[str, Any]) -> list[str]:
    milliseconds, tokens = row["milliseconds"], row["visual_tokens"]
    spread = "" if tokens["min"] == tokens["max"] else f" ({tokens['min']}–{tokens['max']})"
    peak = row["peak_torch_bytes"] or row["peak_process_bytes"]
    stages = ("vision", "prune_merge", "projector", "prefill", "decode_step", "first_token")
    return [
        f"{tokens['mean']:.0f}{spread}",
        _time(row["preprocessing_ms"]),
        *(_time(milliseconds[stage]) for stage in stages),
        *(_ratio(row["speedup"][stage]) for stage in ("prefill", "first_token")),
        f"{row['kv_cache_bytes'] / 2**20:.1f}",
        "–" if peak is None else f"{peak / 2**20:,.0f}",
    ]


def _time(found: dict[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{found['median']:,.0f}" if found["median"] >= 100 else f"{found['median']:.2f}"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['p25']:.2f}–{found['p75']:.2f})"
