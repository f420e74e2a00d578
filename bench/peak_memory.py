"""The most memory that PyTorch holds while something runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(
    call: Callable[[], Any], held: Iterable[torch.Tensor], device: torch.device
) -> dict[str, int]:
    """Bytes on `device` before a call, and the most there were during it.

    What ran before makes no difference, unlike to the memory of the process, which keeps what was
    freed. Buffers of libraries that do not go through PyTorch's allocator are not counted.

    Args:
        call: What runs. A first call may convert weights for good, so there should have been one.
        held: What is there before, on a CPU: PyTorch counts there only while it is profiled.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return _row(before, torch.cuda.max_memory_allocated(device))
    before = storage_bytes(held)
    return _row(before, before + _peak_of_allocations(call))


def _row(before: int, peak: int) -> dict[str, int]:
    return {"torch_bytes_before": before, "peak_torch_bytes": peak}


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Weights, buffers, and what bitsandbytes keeps beside its 4-bit weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        # Not by `state_dict`: it would undo how the weights are packed for a CPU.
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if torch.is_tensor(value))
            state = getattr(state, "state2", None)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors, each once however many of them share it."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _peak_of_allocations(call: Callable[[], Any]) -> int:
    """The most bytes at once of all that the CPU allocator gives out during a call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch 2.13's profiler prints lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = list(profiled.profiler.kineto_results.experimental_event_tree())
    for event in events:  # which grows meanwhile
        events += event.children
    live: dict[int, int] = {}  # bytes by address
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.name == "[memory]":
            allocation = event.typed[1]
            # Of what was there before, not even the size is sure when it is freed.
            total -= live.pop(allocation.ptr, 0)
            if allocation.alloc_size > 0:
                live[allocation.ptr] = allocation.alloc_size
                total += allocation.alloc_size
            peak = max(peak, total)
    return peak
