"""Every backend on every shape, one at a time; on a GPU, `python bench/gpu.py` times it better.

pytest bench/bench_backends.py -k "576 and float16" --benchmark-json=FILE
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from bench_prune_merge import features
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.triton_backend import triton_obstacle

BATCHES = (1, 8, 32, 128)
SHAPES = ((576, 1024), (196, 192), (256, 768), (729, 1152), (1024, 1024))  # N, C
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Fixed budgets, so that nothing waits for the device; about what real images keep.
VARIANTS = {
    "prumerge": PruMergeConfig(keep=0.125),
    "prumerge+": PruMergeConfig(keep=0.25, variant="prumerge+"),
}
BACKENDS = ("reference", "torch", "torch-compiled", "triton")

Reduce = Callable[[Tensor, Tensor, Tensor], MergedTokens]


class Case(NamedTuple):
    """One call to time."""

    batch: int
    shape: tuple[int, int]
    dtype: torch.dtype
    variant: str
    backend: str

    def fields(self) -> dict[str, Any]:
        """As a row of a result file begins."""
        return {**self._asdict(), "dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        dtype = self.fields()["dtype"]
        return "-".join(map(str, (self.batch, *self.shape, dtype, self.variant, self.backend)))

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot be timed on a device."""
        if self.backend != "triton":
            return None
        return triton_obstacle(device, self.dtype, self.shape[0])

    def reduce(self) -> Reduce:
        """The function to time, with `query`, `keys` and `hidden` as arguments."""
        config = VARIANTS[self.variant]
        backend = "torch" if self.backend == "torch-compiled" else self.backend

        def call(query: Tensor, keys: Tensor, hidden: Tensor) -> MergedTokens:
            return prune_merge(query, keys, hidden, config, backend=backend)

        if self.backend != "torch-compiled":
            return call
        torch.compiler.reset()
        return torch.compile(call, fullgraph=True, dynamic=False)


CASES = [Case(*values) for values in itertools.product(BATCHES, SHAPES, DTYPES, VARIANTS, BACKENDS)]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_backend(benchmark, case):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = case.obstacle(device)
    if obstacle is not None:
        pytest.skip(obstacle)
    inputs = [tensor.to(device) for tensor in features(case.batch, case.dtype, *case.shape)]
    reduce = case.reduce()

    def run() -> MergedTokens:
        merged = reduce(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return merged

    benchmark.extra_info.update(torch=torch.__version__, device=str(device))
    merged = benchmark.pedantic(run, rounds=7, warmup_rounds=2)
    assert merged.tokens.shape[0] == case.batch
