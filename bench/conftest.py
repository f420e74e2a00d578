"""Times two ways of doing the same thing, round by round in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
import transformers


class Against(Protocol):
    """The `against` fixture."""

    def __call__(
        self, baseline: Callable[[], Any], ours: Callable[[], Any], *, rounds: int, **info: Any
    ) -> Any: ...


@pytest.fixture
def against(benchmark: Any) -> Against:
    """Benchmarks `ours`, with one timed round of `baseline` before each of its rounds.

    So whatever else the machine does hits both. The benchmark's own figures are those of `ours`;
    `extra_info` gets the baseline's median, the median and the quartiles of the ratios of
    neighbouring rounds, the versions, and what else is given by name. Returns what `ours` returns.
    """

    def run(
        baseline: Callable[[], Any], ours: Callable[[], Any], *, rounds: int, **info: Any
    ) -> Any:
        baseline_seconds: list[float] = []

        def time_baseline() -> None:
            start = time.perf_counter()
            baseline()
            baseline_seconds.append(time.perf_counter() - start)

        result = benchmark.pedantic(ours, setup=time_baseline, rounds=rounds, warmup_rounds=1)
        seconds = benchmark.stats.stats.data
        timed = baseline_seconds[-len(seconds) :]  # without the warm-up's
        ratios = [slow / fast for slow, fast in zip(timed, seconds, strict=True)]
        benchmark.extra_info.update(
            median_ms=1e3 * statistics.median(seconds),
            baseline_median_ms=1e3 * statistics.median(timed),
            ratio_median=statistics.median(ratios),
            ratio_quartiles=statistics.quantiles(ratios, n=4)[::2],
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            threads=torch.get_num_threads(),
            **info,
        )
        return result

    return run
