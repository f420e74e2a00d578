"""Where a result comes from: command, versions, machine and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("prumerge_fast", "torch", "transformers", "triton"),
    *("bitsandbytes", "accelerate", "peft"),
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def provenance(command: list[str], device: torch.device) -> dict[str, Any]:
    """What made a result: command, versions, machine and date."""
    return {
        "command": ["prumerge-fast", *command],
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Where an earlier result came about in another way, key by key; empty where in the same."""
    return ", ".join(
        f"{key} {json.dumps(found.get(key))} instead of {json.dumps(expected.get(key))}"
        for key in {**expected, **found}
        # As text: to Python 1 and 1.0 are equal, of which one is a number and one a share.
        if json.dumps(found.get(key), sort_keys=True)
        != json.dumps(expected.get(key), sort_keys=True)
    )


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()
