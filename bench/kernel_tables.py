"""The tables of docs/kernels.md, from `bench/static_report.py`."""

from __future__ import annotations

from typing import Any


def counts(run: dict[str, Any]) -> str:
    """What one image takes, and the lower bounds that follow: a row for each dtype and launch."""
    gpus = list(run["counts"][0]["lower_bounds"])
    lines = [
        "| dtype, launch | programs | warp instructions | longest program | tensor-core "
        "instructions | sectors read, of one read of K and Y | "
        + " | ".join(f"lower bound {gpu}" for gpu in gpus)
        + " |",
        "|---|" + "---:|" * (5 + len(gpus)),
    ]
    for row in run["counts"]:
        bounds = [row["lower_bounds"][gpu] for gpu in gpus]
        cells = [
            f"{row['dtype']}, {row['case']}",
            str(row["programs"]),
            f"{row['warp_instructions']:,}",
            f"{row['longest_program']:,}",
            f"{row['tensor_core_instructions']:,}",
            f"{row['sectors_read'] / row['sectors_of_keys_and_hidden']:.2f}",
            *(f"{b['latency_us']:.1f} µs; {b['per_image_us']:.1f} µs" for b in bounds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def received(run: dict[str, Any]) -> str:
    """What attention received takes of one image, beside its tower: a row for each launch."""
    lines = [
        "| tower: N, C, heads | launch | programs | warp instructions | longest program | "
        "tensor-core instructions | read, of one read of Q and K | written | operations, of the "
        "tower's |",
        "|---|---|" + "---:|" * 7,
    ]
    for row in run["received_counts"]:
        read = row["bytes_read"] / row["bytes_of_queries_and_keys"]
        cells = [
            f"{row['tower']}: {row['patches']:,}, {row['channels']:,}, {row['heads']}",
            row["launch"],
            str(row["programs"]),
            f"{row['warp_instructions']:,}",
            f"{row['longest_program']:,}",
            f"{row['tensor_core_instructions']:,}",
            f"{read:.1f}",
            f"{row['bytes_written'] / 1024:.0f} KiB",
            f"{row['operations'] / row['tower_operations']:.2%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def resources(run: dict[str, Any]) -> str:
    """What a program needs: a row for each target, a column for each dtype and launch."""
    rows = run["resources"]
    cases = list(dict.fromkeys((row["dtype"], row["case"]) for row in rows))
    found = {(row["target"], row["dtype"], row["case"]): row for row in rows}
    lines = [
        "| target | " + " | ".join(", ".join(case) for case in cases) + " |",
        "|---|" + "---:|" * len(cases),
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        cells = [_resources(found[(target, *case)]) for case in cases]
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _resources(row: dict[str, Any]) -> str:
    shared = f"{row['shared'] / 1024:.0f} of {row['shared_limit'] / 1024:.0f}"
    return f"{row['registers']}; {row['spills']}; {shared} KiB; {row['binary_size'] / 1000:.0f} KB"
