"""Kernels with one synchronising instruction removed from their PTX: is it noticed?

Removing a barrier or a wait gives wrong results in some schedules; the race detector finds it
in every schedule.
"""

from __future__ import annotations

import re

import ptxemu
import pytest
import sample_kernels as kernels
import torch

SEEDS = range(6)


def run_matmul() -> bool:
    torch.manual_seed(0)
    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    c = torch.full((64, 64), torch.nan)
    kernels.matmul[(2, 2)](a, b, c, 64, 64, 64, BM=32, BN=32, BK=16, num_stages=3)
    return torch.allclose(c.double(), a.double() @ b.double(), atol=1e-3)


def run_softmax() -> bool:
    torch.manual_seed(0)
    x = torch.randn(4, 781)
    o = torch.full_like(x, torch.nan)
    kernels.softmax[(4,)](x, o, 781, 781, B=1024)
    return torch.allclose(o, x.softmax(1), atol=1e-6)


def without(pattern: str, number: int):
    """A rewrite that drops the `number`-th match of `pattern`."""

    def rewrite(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx))
        start, stop = matches[number].span()
        return ptx[:start] + ptx[stop:]

    return rewrite


def count(emulate, run, pattern: str) -> int:
    seen = []
    emulate(80, schedule="lockstep", rewrite_ptx=lambda ptx: seen.append(ptx) or ptx)
    assert run()
    return len(re.findall(pattern, seen[0]))


BARRIER = r"bar\.sync\s+0;"
WAIT = r"cp\.async\.wait_group[^;]*;"


@pytest.mark.parametrize(
    ("run", "pattern"),
    [(run_matmul, BARRIER), (run_softmax, BARRIER), (run_matmul, WAIT)],
    ids=["matmul-barrier", "softmax-barrier", "matmul-wait"],
)
def test_missing_synchronisation(emulate, run, pattern):
    total = count(emulate, run, pattern)
    assert total > 0
    wrong, racy = [], []
    for number in range(total):
        emulator = emulate(80, check_races=True, rewrite_ptx=without(pattern, number))
        for seed in SEEDS:
            emulator.seed = seed
            if not run():
                wrong.append(number)
            if emulator.last.races:
                racy.append(number)
    assert wrong, "no schedule showed wrong results"
    # Triton sometimes waits twice, so a mutant may be harmless; one that is not is found always.
    found_always = {number for number in range(total) if racy.count(number) == len(SEEDS)}
    assert set(wrong) <= found_always
    assert len(found_always) >= 2


def test_races_stop_the_launch(emulate):
    emulate(80, check_races="raise", rewrite_ptx=without(BARRIER, 0))
    with pytest.raises(ptxemu.RaceDetected, match="shared memory"):
        run_softmax()


@pytest.mark.parametrize(
    ("old", "new"),
    [("max.f32", "min.f32"), ("ex2.approx", "lg2.approx"), ("shfl.sync.bfly", "shfl.sync.up")],
)
def test_wrong_arithmetic(emulate, old, new):
    emulate(80, rewrite_ptx=lambda ptx: ptx.replace(old, new))
    assert not run_softmax()


def test_wrong_matrix_load(emulate):
    emulate(80, rewrite_ptx=lambda ptx: ptx.replace(".x4.trans", ".x4"))
    assert not run_matmul()
