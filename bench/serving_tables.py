"""The tables of docs/serving.md: how many requests a GPU holds, and what vLLM did on a CPU."""

from __future__ import annotations

import math
from typing import Any

BLOCK = 16  # tokens of a block of vLLM's KV cache
UTILISATION = 0.92  # of a GPU's memory, vLLM's `gpu_memory_utilization`
RESERVE = 2 * 2**30  # bytes for activations and CUDA graphs, which vLLM measures; assumed here
ANSWER = 100  # tokens
GPUS = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9}
ROWS = {"LLaVA": 576, "keep=144": 145, "keep=64": 65, "keep=32": 33}


def sizing(run: dict[str, Any]) -> str:
    """Blocks of the KV cache of a request with one image, and the requests that fit at once.

    Args:
        run: What `prumerge-fast cost --json` said.
    """
    text = run["text_tokens"]
    lines = [
        "| | " + " | ".join(ROWS) + " |",
        "|---|" + "---:|" * len(ROWS),
        "| tokens of an image | " + " | ".join(map(str, ROWS.values())) + " |",
        f"| KV blocks of a request ({text} tokens of text, {ANSWER} of answer) | "
        + " | ".join(str(_blocks(rows, text)) for rows in ROWS.values())
        + " |",
    ]
    for name, model in run["models"].items():
        plain = model["policies"]["LLaVA"]["FP16"]
        token = plain["kv_cache_bytes"] / plain["prompt_tokens"]
        for gpu, size in GPUS.items():
            left = UTILISATION * size - plain["weights_bytes"] - RESERVE
            if left <= 0:
                continue
            fit = [int(left // (BLOCK * token)) // _blocks(rows, text) for rows in ROWS.values()]
            lines.append(
                f"| {name}, FP16, {gpu}: requests at once | " + " | ".join(map(str, fit)) + " |"
            )
    return "\n".join(lines)


def _blocks(rows: int, text: int) -> int:
    return math.ceil((rows + text + ANSWER) / BLOCK)


def throughput(rows: list[dict[str, Any]]) -> str:
    """Requests a second and ratios to LLaVA in the same round, of each row of the result file."""
    lines = [
        "| | | tokens of an image | requests a second | ratio to LLaVA (lowest to highest) |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        title = f"{row['decoder']} decoder, {row['layers']} layers, {row['dtype']}"
        for name, policy in row["policies"].items():
            ratios = policy["ratios"]
            ratio = f"**{policy['ratio_median']:.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"
            lines.append(
                f"| {title} | {name} | {policy['tokens_per_image']} "
                f"| {policy['requests_per_second']:.2f} | {'–' if name == 'LLaVA' else ratio} |"
            )
    return "\n".join(lines)


def memory(rows: list[dict[str, Any]]) -> str:
    """What the encoder needs at its peak, with the tower's batches and without."""
    row = next(row for row in rows if row["decoder"] == "toy")
    mib = 2**20
    lines = [
        "| | images that vLLM encodes at once | peak, split | peak, not split |",
        "|---|---:|---:|---:|",
    ]
    for name, policy in row["policies"].items():
        unsplit = policy.get("encoder_peak_bytes_unsplit")
        lines.append(
            f"| {name} | {policy['images_at_once']} | {policy['encoder_peak_bytes'] / mib:.0f} MiB "
            f"| {'–' if unsplit is None else f'{unsplit / mib:.0f} MiB'} |"
        )
    return "\n".join(lines)
