"""Times launch configurations on the GPU at hand, once for each kind of call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from .launch_config import LaunchConfig

_fastest: dict[Hashable, LaunchConfig] = {}


def fastest(
    key: Hashable, candidates: Sequence[LaunchConfig], launch: Callable[[LaunchConfig], object]
) -> LaunchConfig:
    """The candidate that takes the least time, kept for as long as the process lives.

    Args:
        key: What the time depends on; a second call with it times nothing.
        candidates: At least one, of which the first fits the GPU.
        launch: Runs the kernel with a candidate.
    """
    if key not in _fastest:
        benchmark = driver.active.get_benchmarker()

        def median(candidate: LaunchConfig) -> float:
            try:
                return benchmark(lambda: launch(candidate), quantiles=(0.5,))
            except OutOfResources:
                return float("inf")

        times = [median(candidate) for candidate in candidates]
        _fastest[key] = candidates[times.index(min(times))]
    return _fastest[key]
