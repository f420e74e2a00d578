"""The curves of accuracy against tokens in docs/results.md, for `bench/update_docs.py`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import matplotlib.pyplot as plt

SHOWN = {
    "random": ("#888888", ":"),
    "evenly spaced": ("#000000", ":"),
    "attention top-k": ("#d95f02", "-."),
    "attention top-k + merge": ("#e6ab02", "-."),
    "PruMerge": ("#1b6ca8", "-"),
    "PruMerge, raster order": ("#1b6ca8", "--"),
    "PruMerge+": ("#1b9e77", "-"),
    "PruMerge+, raster order": ("#1b9e77", "--"),
}


def draw(results: Path, output: Path) -> None:
    """Draws what `prumerge-fast evaluate` measured, as a PNG with the results' checksum."""
    content = results.read_bytes()
    run = json.loads(content)
    policies, budgets = run["policies"], run["settings"]["tokens"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method, (colour, style) in SHOWN.items():
        entries = [policies[f"{method} ({budget})"]["accuracy"]["overall"] for budget in budgets]
        low, high = zip(*(entry["interval"] for entry in entries), strict=True)
        axes.plot(budgets, [e["value"] for e in entries], style, color=colour, label=method)
        axes.fill_between(budgets, low, high, color=colour, alpha=0.12, linewidth=0)
    everything = policies["all tokens"]
    axes.axhline(everything["accuracy"]["overall"]["value"], color="#aa0000", linewidth=0.8)
    axes.annotate(
        f"all {everything['visual_tokens']:.0f} tokens",
        (budgets[0], everything["accuracy"]["overall"]["value"]),
        xytext=(0, 4),
        textcoords="offset points",
    )
    axes.set(
        xscale="log",
        xlabel="visual tokens",
        ylabel="exact match",
        title=f"{run['model']}, {run['questions']['overall']} questions on scenes never trained on",
    )
    axes.set_xticks(budgets, budgets)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend()
    checksum = hashlib.sha256(content).hexdigest()
    figure.savefig(output, dpi=110, metadata={"Results": checksum})
