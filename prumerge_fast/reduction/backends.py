"""Which backend runs, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from prumerge_fast.errors import BackendUnavailableError
from prumerge_fast.reduction.triton_backend import triton_obstacle

BACKENDS = ("auto", "triton", "torch", "reference")


class ResolvedBackend(NamedTuple):
    """The backend that will run, and why, in words for a person."""

    name: str
    reason: str


def resolve_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    num_patches: int | None = None,
) -> ResolvedBackend:
    """Which backend runs for tensors on `device` when `backend` is asked for.

    Args:
        backend: One of `BACKENDS`.
        device: Where the tensors are.
        dtype: Their dtype; `None`: one that every backend takes.
        num_patches: N; `None`: a number that every backend takes.

    Raises:
        TypeError: `backend` is no string.
        ValueError: There is no backend of that name.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a string, got {backend!r} ({type(backend).__name__})")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    device = torch.device(device)
    if backend == "auto":
        if device.type == "cpu":
            return ResolvedBackend("torch", "vectorised PyTorch, because the tensors are on a CPU")
        obstacle = triton_obstacle(device, dtype, num_patches)
        if obstacle is None:
            return ResolvedBackend("triton", "a Triton kernel supports this device")
        return ResolvedBackend("torch", f"vectorised PyTorch, because {obstacle}")
    if backend == "triton":
        obstacle = triton_obstacle(device, dtype, num_patches)
        if obstacle is not None:
            raise BackendUnavailableError(f"backend='triton' cannot run: {obstacle}")
    return ResolvedBackend(backend, "asked for by name")
