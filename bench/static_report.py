"""What the kernel needs and does on each GPU, without a GPU: counts and lower bounds, no timings.

    python bench/static_report.py     # about 10 minutes; writes bench/results/static-report.json

Registers, spills, shared memory and code size come from ahead-of-time compilation, instruction and
memory counts from running the compiled PTX for sm_80 in the emulator (tests/ptxemu), on the golden
image with 52 centres. The bounds are those of the instruction roofline model (Ding and Williams
2019): no launch is faster, and none need come near.
"""

from __future__ import annotations

import script

if __name__ == "__main__":
    script.interruptible()

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import ptxemu  # noqa: E402
from kernel_cases import golden  # noqa: E402
from kernel_resources import SHARED_MEMORY, TARGETS, resources_of  # noqa: E402
from prumerge_fast.kernels import launch_config  # noqa: E402
from prumerge_fast.kernels.received_attention import choose_tiles, launch_arguments  # noqa: E402

from prumerge_fast.harness.provenance import provenance  # noqa: E402
from prumerge_fast.reduction.config import PruMergeConfig  # noqa: E402
from prumerge_fast.reduction.dispatch import prune_merge  # noqa: E402

IMAGE = "heavy_tailed_0"
ROWS = 53  # of that image, with its supplement
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BATCHES = {"B = 1": 1, "one program an image": 1024}
# Multiprocessors, boost clock in Hz and memory bandwidth in bytes/s, from NVIDIA's data sheets of
# the A100 80GB SXM, the H100 SXM and the Ada architecture. Each multiprocessor issues four warp
# instructions a clock.
GPUS = {
    "A100": (108, 1.41e9, 2.039e12),
    "H100": (132, 1.98e9, 3.35e12),
    "RTX 4090": (128, 2.52e9, 1.008e12),
}
# Towers whose patches are scored by the attention they receive: N, C, heads, layers and the width
# of the MLP.
TOWERS = {
    "SigLIP SO400M/14-384": (729, 1152, 16, 27, 4304),
    "InternViT 300M/14-448": (1024, 1024, 16, 24, 4096),
}


def resources() -> list[dict[str, Any]]:
    """A row for each dtype, batch and target, at CLIP ViT-L/14-336's shape."""
    rows = []
    for dtype in DTYPES:
        for case, batch in BATCHES.items():
            for target in TARGETS:
                launch = launch_config.choose_launch(batch, 576, 1024, ROWS, dtype, target)
                found = resources_of(launch, 576, 1024, dtype, target)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "case": case,
                        **dataclasses.asdict(found),
                        "shared_limit": SHARED_MEMORY[target],
                        "launch": dataclasses.asdict(launch),
                    }
                )
    return rows


def counts() -> list[dict[str, Any]]:
    """A row for each dtype and batch: one image, emulated for sm_80, and its lower bounds."""
    choose = launch_config.choose_launch
    inputs, _ = golden(IMAGE)
    rows = []
    try:
        for dtype in DTYPES:
            for case, batch in BATCHES.items():
                launch_config.choose_launch = lambda _, *rest, batch=batch: choose(batch, *rest)
                tensors = [tensor.to(dtype).clone() for tensor in inputs]
                with ptxemu.install(80, schedule="lockstep", profile=True) as emulator:
                    prune_merge(*tensors, PruMergeConfig(), backend="triton")
                rows.append(_row(dtype, case, emulator.last, sum(t.nbytes for t in tensors[1:])))
    finally:
        launch_config.choose_launch = choose
    return rows


def _row(dtype: torch.dtype, case: str, stats: ptxemu.LaunchStats, once: int) -> dict[str, Any]:
    bounds = {}
    for name, (multiprocessors, clock, bandwidth) in GPUS.items():
        bound = ptxemu.roofline(stats, multiprocessors, clock, bandwidth)
        bounds[name] = {
            "latency_us": 1e6 * bound.seconds,
            "latency_bound": bound.bound,
            # When other images fill the GPU, no image takes less of it than this.
            "per_image_us": 1e6 * max(bound.issue_throughput, bound.compulsory_memory),
        }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "case": case,
        "programs": len(stats.program_instructions),
        "warp_instructions": stats.warp_instructions,
        "longest_program": stats.critical_path,
        "tensor_core_instructions": stats.mma,
        "sectors_read": stats.of("global", "load").transactions,
        "sectors_written": stats.of("global", "store").transactions,
        "sectors_of_keys_and_hidden": once // 32,
        "lower_bounds": bounds,
    }


def received_counts() -> list[dict[str, Any]]:
    """A row for each tower and launch of `received_attention`: one image in 16 bits, for sm_80."""
    rows = []
    for tower, (patches, channels, heads, layers, mlp) in TOWERS.items():
        query, keys = torch.zeros(2, 1, patches, channels, dtype=torch.float16)
        tiles = choose_tiles(channels // heads, keys.dtype, "sm_80")
        _, launches = launch_arguments(query, keys, heads, tiles=tiles, class_token=False)
        # Products only, as `prumerge-fast cost` counts a tower.
        layer = patches * channels * (8 * channels + 4 * mlp) + 4 * patches**2 * channels
        for name, launch in zip(("what softmax divides by", "sums"), launches, strict=True):
            with ptxemu.install(80, schedule="lockstep", profile=True) as emulator:
                launch.kernel[launch.grid](*launch.positional, **launch.named)
            stats = emulator.last
            rows.append(
                {
                    "tower": tower,
                    "patches": patches,
                    "channels": channels,
                    "heads": heads,
                    "launch": name,
                    "programs": len(stats.program_instructions),
                    "warp_instructions": stats.warp_instructions,
                    "longest_program": stats.critical_path,
                    "tensor_core_instructions": stats.mma,
                    "bytes_read": 32 * stats.of("global", "load").transactions,
                    "bytes_written": 32 * stats.of("global", "store").transactions,
                    "bytes_of_queries_and_keys": query.nbytes + keys.nbytes,
                    "operations": 2 * patches**2 * channels,
                    "tower_operations": layers * layer,
                }
            )
    return rows


def kernel_digest() -> str:
    """Of the source of the kernel and its launch configurations, lines of comment left out."""
    lines = [
        line
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for line in path.read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def main(arguments: list[str]) -> None:
    """Writes the report."""
    parser = script.Parser(description=__doc__.splitlines()[0])
    default = ROOT / "bench" / "results" / "static-report.json"
    parser.add_argument("--output", type=Path, default=default, help="the result file (JSON)")
    path = parser.parse_args(arguments).output
    result = {
        **provenance([], torch.device("cpu")),
        "command": ["python", "bench/static_report.py", *arguments],
        "kernel_digest": kernel_digest(),
        "image": IMAGE,
        "emulated_target": "sm_80",
        "counts": counts(),
        "received_counts": received_counts(),
        "resources": resources(),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    script.run(main)
