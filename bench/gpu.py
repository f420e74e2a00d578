"""Times every backend on the GPU at hand and writes `bench/results/<device>-<date>.json`.

    python bench/gpu.py                       # all of bench_backends.py's cases
    python bench/gpu.py --only 576-1024       # those whose name matches
    python bench/gpu.py --device cpu --only 1-196-192-float32-prumerge-torch$  # no GPU

On a GPU each call is a CUDA graph (the reference, which waits for the device, is not), replayed on
inputs that rotate through more than the L2 cache. `copy` is a copy of a large buffer timed the same
way: the bandwidth that the figures in GB/s are to be held against.
"""

from __future__ import annotations

import script

if __name__ == "__main__":
    script.interruptible()

import datetime
import functools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_backends import CASES, Case
from bench_prune_merge import features

from prumerge_fast.harness.provenance import provenance

RESULTS = Path(__file__).parent / "results"
ROUNDS = range(5, 201)  # as many as take about ROUNDS_SECONDS
ROUNDS_SECONDS = 2.0
COPY_BYTES = 1 << 28


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile in milliseconds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"p20_ms": 1e3 * fifths[0], "p50_ms": 1e3 * statistics.median(seconds),
            "p80_ms": 1e3 * fifths[3]}  # fmt: skip


def seconds_of(calls: list[Callable[[], Any]], device: torch.device, graphs: bool) -> list[float]:
    """Seconds of each of many rounds of the calls, in turn."""
    for call in calls:
        call()
    once = _seconds_on_host(calls[0], device)
    rounds = min(max(int(ROUNDS_SECONDS / once), ROUNDS[0]), ROUNDS[-1])
    if device.type == "cpu":
        return [_seconds_on_host(calls[i % len(calls)], device) for i in range(rounds)]
    runs = [_graph(call).replay for call in calls] if graphs else calls
    events = []
    for round_ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runs[round_ % len(runs)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _seconds_on_host(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, with the wait for the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def _graph(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@torch.inference_mode()
def time_case(case: Case, device: torch.device) -> dict[str, Any]:
    """One row of the results."""
    fields = case.fields()
    obstacle = case.obstacle(device)
    if obstacle is not None:
        return {**fields, "skipped": obstacle}
    inputs = [tensor.to(device) for tensor in features(case.batch, case.dtype, *case.shape)]
    size = sum(tensor.nbytes for tensor in inputs)
    copies = 1
    if device.type == "cuda":
        copies = 2 + torch.cuda.get_device_properties(device).L2_cache_size // size
    reduce = case.reduce()
    copied = [[tensor.clone() for tensor in inputs] for _ in range(copies)]
    calls = [functools.partial(reduce, *given) for given in copied]
    moved = size + calls[0]().tokens.nbytes
    seconds = seconds_of(calls, device, graphs=case.backend != "reference")
    found = {**quantiles(seconds), "rounds": len(seconds)}
    return {**fields, **found, "copies": copies, "gb_per_s": moved / found["p50_ms"] / 1e6}


def time_copy(device: torch.device) -> dict[str, float]:
    """What a copy reaches: bytes read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = quantiles(seconds_of([lambda: target.copy_(source)], device, graphs=True))
    return {**found, "gb_per_s": 2 * COPY_BYTES / found["p50_ms"] / 1e6}


def main(arguments: list[str]) -> Path:
    """Writes the result file and returns where it is."""
    parser = script.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument(
        "--only", default="", help="regular expression of the names of the cases to time"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA GPU here; --device cpu times the CPU")
    cases = [case for case in CASES if re.search(options.only, str(case))]
    if not cases:
        parser.error(f"--only: no case's name matches {options.only!r}; one is {CASES[0]}")
    result = provenance([], device)
    result["command"] = ["python", "bench/gpu.py", *arguments]
    result["copy"] = time_copy(device)
    result["cases"] = []
    name = re.sub(r"\W+", "-", result["machine"]["device"]).lower()
    path = options.output / f"{name}-{datetime.date.today()}.json"
    for case in cases:
        try:
            row = time_case(case, device)
        except torch.OutOfMemoryError as error:
            row = {**case.fields(), "skipped": str(error)}
        result["cases"].append(row)
        print(case, row.get("p50_ms", "skipped"), flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")  # what is done stays, if it stops
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    script.run(main)
