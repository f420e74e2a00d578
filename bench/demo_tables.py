"""Tables of the demo model's fine-tuning run and of its quantised language model."""

from __future__ import annotations

from typing import Any


def finetuning(run: dict[str, Any]) -> str:
    """A row for each of the four models, accuracy by kind of question."""
    rows = run["results"]
    kinds = list(next(iter(rows.values()))["accuracy_by_category"])
    lines = [
        "| | visual tokens | accuracy | " + " | ".join(kinds) + " | seconds a step |",
        "|---|" + "---:|" * (len(kinds) + 3),
    ]
    for name, row in rows.items():
        training = row.get("training")
        seconds = f"{training['seconds'] / training['steps']:.1f}" if training else "–"
        cells = [f"{row['accuracy_by_category'][kind]:.1%}" for kind in kinds]
        lines.append(
            f"| {name} | {row['visual_tokens']['mean']:.1f} | **{row['accuracy']:.1%}** | "
            + " | ".join([*cells, seconds])
            + " |"
        )
    lines += ["", f"{run['questions']} questions on scenes never trained on."]
    return "\n".join(lines)


def trained(run: dict[str, Any]) -> str:
    """The run in a sentence."""
    rows = run["results"]
    before, after = rows["LLaVA-PruMerge"], rows["LLaVA-PruMerge fine-tuned"]
    few, all_tokens = (row["visual_tokens"]["mean"] for row in (after, rows["LLaVA"]))
    return (
        "One epoch of LoRA under `patch` takes the demo model from "
        f"**{before['accuracy']:.1%}** to **{after['accuracy']:.1%}** at the same {few:.0f} visual "
        f"tokens (with all {all_tokens:.0f}: {rows['LLaVA']['accuracy']:.1%}, trained alike "
        f"{rows['LLaVA fine-tuned']['accuracy']:.1%}); a small model on synthetic scenes."
    )


def quantised(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each precision of the language model, accuracy by policy."""
    policies = list(next(iter(runs.values()))["results"])
    lines = [
        "| language model | weights | " + " | ".join(policies) + " |",
        "|---|" + "---:|" * (len(policies) + 1),
    ]
    for name, run in runs.items():
        cells = [f"{run['results'][policy]['accuracy']:.1%}" for policy in policies]
        lines.append(f"| {name} | {run['weight_bytes'] / 2**20:.1f} MiB | {' | '.join(cells)} |")
    count = next(iter(runs.values()))["questions"]
    lines += ["", f"Accuracy on {count} questions on scenes never trained on."]
    return "\n".join(lines)
