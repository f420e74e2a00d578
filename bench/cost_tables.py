"""The tables of docs/cost.md, from `prumerge-fast cost --json`."""

from __future__ import annotations

from typing import Any

GPUS = ("V100", "A100", "H100", "RTX4090", "T4")
PRECISIONS = ("FP16", "INT8", "INT4")
STAGES = {
    "vision": "vision tower",
    "prune_merge": "prune+merge",
    "projector": "projector",
    "prefill": "prefill",
    "decode": "one decode step",
}
QUANTITIES = {
    "operations": "FLOPs, T",
    "prefill": "prefill, ms",
    "memory": "total memory, GB",
    "activations": "storing activation, GB",
}


def shapes(run: dict[str, Any]) -> str:
    """Operations, memory and roofline times of the built-in shapes."""
    lines: list[str] = []
    for name, model in run["models"].items():
        policies = model["policies"]
        halves = [policy["FP16"] for policy in policies.values()]
        lines += [
            f"**{name}**, {run['text_tokens']} text tokens",
            "",
            "| | " + " | ".join(policies) + " |",
            "|---|" + "---:|" * len(policies),
            "| visual tokens | " + " | ".join(str(h["visual_tokens"]) for h in halves) + " |",
        ]
        for stage, title in STAGES.items():
            cells = [_stage(half["stages"].get(stage)) for half in halves]
            lines.append(f"| {title}, operations and bytes | " + " | ".join(cells) + " |")
        lines.append(
            "| KV cache; peak activations | "
            + " | ".join(
                f"{h['kv_cache_bytes'] / 1e6:.1f} MB; {h['activation_bytes'] / 1e6:.1f} MB"
                for h in halves
            )
            + " |"
        )
        for precision in PRECISIONS:
            cells = [
                f"{policy[precision]['weights_bytes'] / 1e9:.2f} GB; "
                f"{policy[precision]['memory_bytes'] / 1e9:.2f} GB"
                for policy in policies.values()
            ]
            lines.append(f"| weights; all memory, {precision} | " + " | ".join(cells) + " |")
        for device in GPUS:
            for precision in ("FP16", "INT4"):
                cells = [
                    _times(policy[precision]["roofline_seconds"][device])
                    for policy in policies.values()
                ]
                lines.append(f"| {device}, {precision} | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append("Devices: roofline time of prefill; first token; one decode step, in ms.")
    return "\n".join(lines)


def published(run: dict[str, Any]) -> str:
    """Every figure of the paper's table, ours, theirs recomputed, and why ours differs."""
    lines = [
        "| LLaVA → PruMerge | published | ours | their accounting, recomputed | why ours differs |",
        "|---|---:|---:|---:|---|",
    ]
    reasons: dict[str, str] = {}
    for quantity, title in QUANTITIES.items():
        rows = [row for row in run["published"] if row["quantity"] == quantity]
        for plain, pruned in zip(rows[::2], rows[1::2], strict=True):
            marks = [
                reasons.setdefault(row["why"], chr(ord("a") + len(reasons)))
                for row in (plain, pruned)
            ]
            cells = [
                f"{plain[field]:{form}} → {pruned[field]:{form}}"
                for field, form in (("published", "g"), ("ours", ".3g"), ("recomputed", ".3g"))
            ]
            lines.append(
                f"| {title}, {plain['model']} {plain['precision']} | {' | '.join(cells)} "
                f"| {', '.join(dict.fromkeys(marks))} |"
            )
    lines += ["", *(f"- {mark}: {reason}" for reason, mark in reasons.items())]
    return "\n".join(lines)


def _stage(stage: dict[str, float] | None) -> str:
    if stage is None:
        return "–"
    return f"{stage['operations'] / 1e9:,.2f} G; {stage['bytes'] / 1e6:,.1f} MB"


def _times(seconds: dict[str, float]) -> str:
    first = sum(seconds.values()) - seconds["decode"]
    return "; ".join(
        f"{1e3 * value:.2f}" for value in (seconds["prefill"], first, seconds["decode"])
    )
