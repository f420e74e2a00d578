"""`doctor`: what is installed, which backend will run, what scores a model's patches, and why."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from prumerge_fast.cli import report
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.harness.models import describe, outline
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.reduction.backends import resolve_backend
from prumerge_fast.serving.installed import plugin

# What patches are scored by, in words.
SCORES = {"class": "the class token's attention", "received": "the attention they receive"}


def run(command: list[str], model: str | None, *, as_json: bool) -> None:
    """Runs the command.

    Raises:
        InputError: The model is not there, broken, or of no supported family.
        UnsupportedModelError: PruMerge cannot work on this model of a supported family.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    present = (MODEL_DIR / "config.json").is_file()
    found = {
        "demo_model": {"folder": str(MODEL_DIR), "present": present},
        "model": _model(model or MODEL_DIR) if model or present else None,
        "cuda": torch.version.cuda,
        "devices": {str(device): _describe(device) for device in devices},
        "vllm_plugin": plugin()._asdict(),
        "backends": {str(device): resolve_backend("auto", device)._asdict() for device in devices},
        **provenance(command, devices[-1]),
    }
    if as_json:
        report.print_json(found)
    else:
        report.console().print(_table(found))


def _model(source: str | Path) -> dict[str, Any]:
    """What `patch` does on a model, of which only the configuration is read."""
    described = describe(source)
    family, llava = described.family, outline(described)
    return {
        "name": described.name,
        "class": described.model_class.__name__,
        "patches": family.num_patches(llava),
        "scores": family.scores(llava),
        "why": family.why_scores(llava),
        "defaults": asdict(family.default_config(llava)),
    }


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


def _table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for package, version in found["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_row("CUDA", found["cuda"] or "not in this PyTorch", end_section=True)
    for device, description in found["devices"].items():
        backend = found["backends"][device]
        table.add_row(device, description)
        table.add_row("", f"backend {backend['name']}: {backend['reason']}")
    table.rows[-1].end_section = True
    vllm = found["vllm_plugin"]
    table.add_row("vLLM", vllm["vllm"] or "not installed")
    if vllm["vllm"]:
        charge = "in charge" if vllm["in_charge"] else "not in charge"
        table.add_row("", f"plugin {charge}: {vllm['reason']}")
    table.rows[-1].end_section = True
    model = found["demo_model"]
    table.add_row("demo model", model["folder"] if model["present"] else "missing")
    if found["model"]:
        table.rows[-1].end_section = True
        table.add_row("model", "{name}, {class}, {patches} patches".format(**found["model"]))
        scored = SCORES[found["model"]["scores"]]
        table.add_row("", f"patches are scored by {scored}: {found['model']['why']}")
        table.add_row(
            "", "patch(model): {variant}, keep={keep}".format(**found["model"]["defaults"])
        )
    return table
