"""The tables of docs/results.md, from `prumerge-fast evaluate --output`."""

from __future__ import annotations

from typing import Any

OURS = ("PruMerge", "PruMerge+")
KINDS_AT = 32  # tokens at which the table of kinds compares


def curve(run: dict[str, Any]) -> str:
    """Accuracy against tokens kept: a row for each method, a column for each budget."""
    policies = run["policies"]
    budgets = run["settings"]["tokens"]
    methods = dict.fromkeys(row["method"] for row in policies.values() if row["budget"])
    lines = [
        "| visual tokens | " + " | ".join(map(str, budgets)) + " |",
        "|---|" + "---:|" * len(budgets),
    ]
    for method in methods:
        cells = [_share(policies[f"{method} ({b})"]["accuracy"]["overall"]) for b in budgets]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append("")
    for name in (name for name, row in policies.items() if row["budget"] is None):
        row = policies[name]
        lines.append(
            f"- {name}: {_share(row['accuracy']['overall'])}, {row['visual_tokens']:.1f} tokens "
            "on average"
        )
    return "\n".join(lines)


def kinds(run: dict[str, Any]) -> str:
    """Accuracy by kind of question and POPE's measures at one budget."""
    policies = run["policies"]
    shown = [name for name, row in policies.items() if row["budget"] in (None, KINDS_AT)]
    asked = [kind for kind in run["questions"] if kind != "overall"]
    measures = list(policies[shown[0]]["pope"])
    lines = [
        "| | " + " | ".join([*asked, *(f"POPE {m.replace('_', '-')}" for m in measures)]) + " |",
        "|---|" + "---:|" * (len(asked) + len(measures)),
    ]
    for name in shown:
        row = policies[name]
        entries = [row["accuracy"][kind] for kind in asked] + [row["pope"][m] for m in measures]
        lines.append(f"| {name} | " + " | ".join(_value(entry) for entry in entries) + " |")
    return "\n".join(lines)


def paired(run: dict[str, Any]) -> str:
    """Differences between methods at equal budgets, and a line on each where it wins and loses."""
    names = list(run["questions"])
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in run["paired"]:
        if row["against"] != "all tokens":
            rows.setdefault((row["policy"], row["against"]), {})[row["kind"]] = row
    lines = ["| difference | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for (policy, against), by_kind in rows.items():
        cells = [_difference(by_kind[kind]) for kind in names]
        lines.append(f"| {policy} − {against} | " + " | ".join(cells) + " |")
    lines.append("")
    verdicts: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}
    for (policy, against), by_kind in rows.items():
        method, budget = policy.removesuffix(")").split(" (")
        found = verdicts.setdefault((method, against.split(" (")[0]), {"wins": {}, "loses": {}})
        for kind in names:
            low, high = by_kind[kind]["interval"]
            if low > 0 or high < 0:
                found["wins" if low > 0 else "loses"].setdefault(kind, []).append(budget)
    for (method, against), found in verdicts.items():
        said = "; ".join(
            f"{verdict} on "
            + (", ".join(f"{kind} at {'/'.join(at)}" for kind, at in where.items()) or "nothing")
            for verdict, where in found.items()
        )
        lines.append(f"- {method} against {against}: {said}.")
    return "\n".join(lines)


def _value(entry: dict[str, Any]) -> str:
    return "–" if entry["value"] is None else f"{100 * entry['value']:.1f}"


def _share(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['value']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _difference(entry: dict[str, Any]) -> str:
    """In points, with its interval; bold where the interval excludes 0."""
    low, high = entry["interval"]
    text = f"{100 * entry['value']:+.1f} ({100 * low:+.1f}…{100 * high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text
