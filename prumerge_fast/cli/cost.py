"""`cost`: operations, bytes, memory and roofline times, and the paper's table beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from prumerge_fast import cost
from prumerge_fast.cli import report
from prumerge_fast.cost.published import PAPERS_KEEP
from prumerge_fast.errors import InputError, UnsupportedModelError
from prumerge_fast.harness.models import read_config
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.reduction.config import PruMergeConfig

BUILT_IN = {shape.name: shape for shape in (cost.LLAVA_1_5_7B, cost.LLAVA_1_5_13B)}
CPU = "cpu"
# The paper's averages, as shares of 576 tokens: about 40 for PruMerge, a quarter for PruMerge+.
_PAPERS_KEEP = {"prumerge": PAPERS_KEEP / 576, "prumerge+": 0.25}
_NAMES = {"prumerge": "PruMerge", "prumerge+": "PruMerge+"}
_STAGES = {
    "vision": "vision tower",
    "prune_merge": "prune+merge",
    "projector": "projector",
    "prefill": "prefill",
    "decode": "one decode step",
}
_QUANTITIES = {
    "operations": "operations, T",
    "prefill": "prefill, ms",
    "memory": "total memory, GB",
    "activations": "storing activation, GB",
}


@dataclass(frozen=True)
class CostOptions:
    """The options of the command (`prumerge-fast cost --help` describes them)."""

    command: list[str]
    models: list[str]
    chosen: list[Mapping[str, Any]]
    text_tokens: int
    devices: list[str]
    as_json: bool


def run(options: CostOptions) -> None:
    """Runs the command.

    Raises:
        InputError: A model, a device or `keep` cannot be used.
        UnsupportedModelError: A model is no LLaVA that PruMerge works on.
    """
    devices = _devices(options.devices)
    shapes = [_shape(model) for model in options.models] or list(BUILT_IN.values())
    found = {shape.name: _estimates(options, shape) for shape in shapes}
    comparisons = cost.compare_with_paper() if any(name in BUILT_IN for name in found) else []
    if options.as_json:
        report.print_json(_as_json(options, shapes, found, devices, comparisons))
        return
    console = report.console()
    for name, policies in found.items():
        tokens = ", ".join(f"{p} {e['FP16'].visual_tokens}" for p, e in policies.items())
        console.print(f"{name}: {options.text_tokens} text tokens; visual tokens: {tokens}")
        console.print(_stages_table(policies))
        console.print(_memory_table(policies))
        console.print(_times_table(policies, devices))
    console.print(
        "Roofline times are a model from peak rates, not timings: devices take longer. "
        "INT8 and INT4 are the language model's weights; arithmetic stays FP16."
    )
    for device in devices:
        console.print(
            f"{device.name}: {device.operations / 1e12:.4g} T operations/s, "
            f"{device.bandwidth / 1e9:.4g} GB/s ({device.source})"
        )
    if comparisons:
        table, reasons = _paper_table(comparisons)
        console.print(table)
        for mark, reason in reasons.items():
            console.print(f"{mark}: {reason}")


Policies = dict[str, dict[str, cost.Estimate]]  # by policy, then by precision


def _estimates(options: CostOptions, shape: cost.LlavaShape) -> Policies:
    configs: dict[str, PruMergeConfig | None] = {"LLaVA": None}
    for chosen in options.chosen:
        config = PruMergeConfig(**chosen)
        if config.keep is None:
            config = config.replace(keep=_PAPERS_KEEP[config.variant])
        configs[_NAMES[config.variant]] = config
    try:
        return {
            policy: {
                name: cost.estimate(
                    shape, config, text_tokens=options.text_tokens, precision=precision
                )
                for name, precision in cost.PRECISIONS.items()
            }
            for policy, config in configs.items()
        }
    except ValueError as error:  # `keep` is more than the model's patches
        raise InputError(f"--{error}") from None


def _shape(model: str) -> cost.LlavaShape:
    if model in BUILT_IN:
        return BUILT_IN[model]
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = read_config(model, f"{', '.join(BUILT_IN)}, or a folder or a hub name of a LLaVA")
    try:
        return cost.shape_of(config, model)
    except UnsupportedModelError as error:
        raise InputError(f"--model {model}: {error}") from None


def _devices(names: list[str]) -> list[cost.Device]:
    known = {name.lower(): device for name, device in cost.DEVICES.items()}
    chosen = [name.lower() for name in names] or [*known, CPU]
    for name, given in zip(chosen, names, strict=False):
        if name not in known and name != CPU:
            raise InputError(
                f"--device: expected one of {', '.join(cost.DEVICES)} or {CPU}, got {given!r}"
            )
    return [cost.measured_cpu() if name == CPU else known[name] for name in dict.fromkeys(chosen)]


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _stages_table(policies: Policies) -> Table:
    table = _table("Operations and bytes moved, FP16", list(policies))
    for stage, label in _STAGES.items():
        costs = [policy["FP16"].stages.get(stage) for policy in policies.values()]
        if any(costs):
            table.add_row(
                label,
                *(
                    "–" if c is None else f"{c.operations / 1e9:,.3f} G, {c.bytes / 1e6:,.1f} MB"
                    for c in costs
                ),
            )
    return table


def _memory_table(policies: Policies) -> Table:
    table = _table("Memory, GB", list(policies))
    for precision in cost.PRECISIONS:
        for label, field in {
            "weights": "weights_bytes",
            "KV cache of the prompt": "kv_cache_bytes",
            "peak activations": "activation_bytes",
            "together": "memory_bytes",
        }.items():
            values = [getattr(policy[precision], field) for policy in policies.values()]
            table.add_row(f"{precision}, {label}", *(f"{value / 1e9:,.3f}" for value in values))
        table.rows[-1].end_section = True
    return table


def _times_table(policies: Policies, devices: list[cost.Device]) -> Table:
    table = _table("Roofline time, ms: prefill | first token | decode step", list(policies))
    for device in devices:
        for precision in cost.PRECISIONS:
            cells = []
            for policy in policies.values():
                seconds = policy[precision].seconds(device)
                first = sum(seconds.values()) - seconds["decode"]
                times = (seconds["prefill"], first, seconds["decode"])
                cells.append(" | ".join(f"{1e3 * value:.2f}" for value in times))
            table.add_row(f"{device.name}, {precision}", *cells)
        table.rows[-1].end_section = True
    return table


def _paper_table(comparisons: list[cost.Comparison]) -> tuple[Table, dict[str, str]]:
    """The table, and under each mark of its last column why ours differs."""
    marks: dict[str, str] = {}
    table = _table(
        "The paper's table (arXiv 2403.15388, V100): LLaVA → PruMerge",
        ["published", "ours", "their accounting", "why"],
    )
    pairs: dict[tuple[str, str, str], list[cost.Comparison]] = {}
    for row in comparisons:
        pairs.setdefault((row.quantity, row.model, row.precision), []).append(row)
    for quantity, title in _QUANTITIES.items():
        for (kind, model, precision), pair in pairs.items():
            if kind == quantity:
                for row in pair:
                    marks.setdefault(row.why, chr(ord("a") + len(marks)))
                table.add_row(
                    f"{title}, {model} {precision}",
                    " → ".join(f"{row.published:g}" for row in pair),
                    " → ".join(f"{row.ours:.3g}" for row in pair),
                    " → ".join(f"{row.recomputed:.3g}" for row in pair),
                    " ".join(dict.fromkeys(marks[row.why] for row in pair)),
                )
        table.rows[-1].end_section = True
    return table, {mark: reason for reason, mark in marks.items()}


def _as_json(
    options: CostOptions,
    shapes: list[cost.LlavaShape],
    found: dict[str, Policies],
    devices: list[cost.Device],
    comparisons: list[cost.Comparison],
) -> dict[str, Any]:
    import torch

    def as_dict(estimate: cost.Estimate) -> dict[str, Any]:
        return {
            "visual_tokens": estimate.visual_tokens,
            "prompt_tokens": estimate.prompt_tokens,
            "stages": {name: asdict(stage) for name, stage in estimate.stages.items()},
            "weights_bytes": estimate.weights_bytes,
            "kv_cache_bytes": estimate.kv_cache_bytes,
            "activation_bytes": estimate.activation_bytes,
            "memory_bytes": estimate.memory_bytes,
            "roofline_seconds": {d.name: estimate.seconds(d) for d in devices},
        }

    return {
        "text_tokens": options.text_tokens,
        "devices": [asdict(device) for device in devices],
        "models": {
            shape.name: {
                "shape": asdict(shape),
                "parameters": shape.parameters,
                "policies": {
                    policy: {name: as_dict(e) for name, e in precisions.items()}
                    for policy, precisions in found[shape.name].items()
                },
            }
            for shape in shapes
        },
        "published": [asdict(comparison) for comparison in comparisons],
        **provenance(options.command, torch.device("cpu")),
    }
