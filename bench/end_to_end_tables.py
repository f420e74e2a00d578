"""The tables of `end_to_end.py`, for the terminal and for the documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table

TIMES = {  # stage: its row
    "preprocessing": "preprocessing, ms",
    "vision": "vision tower, ms",
    "prune_merge": "prune+merge, ms",
    "projector": "projector, ms",
    "prefill": "prefill, ms",
    "decode_step": "decode, ms a token",
    "first_token": "first token, ms",
}
SHARE = "prune+merge, share of the vision tower"


class _Cell(NamedTuple):
    figure: str
    spread: str = ""

    def __str__(self) -> str:
        return f"{self.figure} {self.spread}".rstrip()


_NONE = _Cell("–")


def summary(result: dict[str, Any]) -> Group:
    """For the terminal."""
    tables = []
    for title, policies, lines in _groups(result):
        table = Table(title=title, title_justify="left")
        table.add_column("", overflow="fold")
        for policy in policies:
            table.add_column(policy, justify="right", overflow="fold")
        for quantity, cells in lines.items():
            table.add_row(quantity, *map(str, cells))
        tables.append(table)
    return Group(*tables, _remark(result, None))


def markdown(result: dict[str, Any], *, spreads_in: str | None = None) -> str:
    """For the documents.

    Args:
        result: Of `end_to_end.py`, or some of its rows.
        spreads_in: Where the quartiles of times are instead, for a table with their medians only.
    """
    text: list[str] = []
    for title, policies, lines in _groups(result):
        text += [f"**{title}**", "", f"| | {' | '.join(policies)} |"]
        text.append("|---|" + "---:|" * len(policies))
        for quantity, cells in lines.items():
            short = spreads_in is not None and quantity in TIMES.values()
            written = [cell.figure if short else str(cell) for cell in cells]
            text.append(f"| {quantity} | {' | '.join(written)} |")
        text.append("")
    return "\n".join([*text, _remark(result, spreads_in)])


def _remark(result: dict[str, Any], spreads_in: str | None) -> str:
    rows = result["rows"]
    spreads = f"how far they spread is in {spreads_in}"
    if spreads_in is None:
        spreads = "±: half of what lies between their quartiles"
    remarks = [
        f"Medians of {result['settings']['rounds']} rounds, times of a whole batch; {spreads}. The "
        "medians of the stages do not add up to that of the whole, and work that is the same in "
        "several columns, such as the vision tower under PruMerge, differs by what else the "
        "machine did. Ratios are to LLaVA in the same round, with their "
        "quartiles. First token: from the call of `generate` to the first token's logits, without "
        "the preprocessing. Peak memory: the most that PyTorch held at once, weights and inputs "
        "included, in a further call that is not timed."
    ]
    runs = result.get("memory_runs", [])
    for number in sorted({row["memory_run"] for row in rows if "memory_run" in row}):
        run = runs[number]
        remarks.append(
            f"It was taken later (`--memory-only`, {run['date'][:10]}, "
            f"torch {run['versions']['torch']}, transformers {run['versions']['transformers']})."
        )
    if any(row["peak_torch_bytes"] is None for row in rows):
        remarks.append("It is – where it was not taken.")
    if any(row["model"] != "demo" for row in rows):
        remarks.append(
            "llava-1.5-7b has random weights, so that how many tokens PruMerge and PruMerge+ keep "
            "by themselves says nothing there; the columns with a budget do."
        )
    return " ".join(remarks)


# A title, the policies, and by quantity a cell for each of them.
_Table = tuple[str, list[str], dict[str, tuple[_Cell, ...]]]


def _groups(result: dict[str, Any]) -> Iterator[_Table]:
    names = ("model", "precision", "batch_size", "decoder_layers", "of_layers")
    for key, rows in itertools.groupby(result["rows"], lambda row: [row[name] for name in names]):
        model, precision, batch, layers, of_layers = key
        title = f"{model}, {precision}, batch of {batch}, {layers} of {of_layers} decoder layers"
        found = list(rows)
        columns = [_cells(row) for row in found]
        policies = [row["policy"].removeprefix("PruMerge, ") for row in found]
        yield title, policies, {name: tuple(c[name] for c in columns) for name in columns[0]}


def _cells(row: dict[str, Any]) -> dict[str, _Cell]:
    tokens = row["visual_tokens"]
    least, most = tokens["min"], tokens["max"]
    milliseconds = {**row["milliseconds"], "preprocessing": row["preprocessing_ms"]}
    share, peak = pruner_share(row), row["peak_torch_bytes"]
    cells = {
        "visual tokens": _Cell(
            f"{tokens['mean']:.0f}", "" if least == most else f"({least}–{most})"
        )
    }
    for stage, quantity in TIMES.items():
        cells[quantity] = _time(milliseconds[stage])
        if stage == "prune_merge":
            cells[SHARE] = _NONE if share is None else _Cell(f"{share:.2%}")
    return cells | {
        "prefill, times faster": _ratio(row["speedup"]["prefill"]),
        "first token, times faster": _ratio(row["speedup"]["first_token"]),
        "KV cache, MiB": _Cell(_mebibytes(row["kv_cache_bytes"])),
        "peak memory, MiB": _NONE if peak is None else _Cell(_mebibytes(peak)),
        "of it beside weights and inputs, MiB": _NONE
        if peak is None
        else _Cell(_mebibytes(peak - row["torch_bytes_before"])),
    }


def pruner_share(row: dict[str, Any]) -> float | None:
    """Time of prune+merge by that of the vision tower, both medians; `None` for LLaVA."""
    ours, tower = (row["milliseconds"][stage] for stage in ("prune_merge", "vision"))
    return None if ours is None else ours["median"] / tower["median"]


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _time(found: dict[str, float] | None) -> _Cell:
    if found is None:
        return _NONE
    digits = 0 if found["median"] >= 100 else 2
    half = (found["p75"] - found["p25"]) / 2
    return _Cell(f"{found['median']:,.{digits}f}", f"± {half:,.{digits}f}")


def _ratio(found: dict[str, float]) -> _Cell:
    return _Cell(f"{found['median']:.2f}", f"({found['p25']:.2f}–{found['p75']:.2f})")
