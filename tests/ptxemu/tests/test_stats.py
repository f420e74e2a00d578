"""Counts agree with what can be worked out by hand, and between schedules."""

from __future__ import annotations

import ptxemu
import pytest
import sample_kernels as kernels
import torch

SCHEDULES = ("interleave", "shuffle", "sequential", "lockstep")


def run_matmul():
    a, b, c = torch.randn(128, 64).half(), torch.randn(64, 128).half(), torch.empty(128, 128)
    kernels.matmul[(2, 2)](a, b, c, 128, 128, 64, BM=64, BN=64, BK=32, num_stages=3)


def test_counts_do_not_depend_on_the_schedule(emulate):
    results = []
    for schedule in SCHEDULES:
        emulator = emulate(80, schedule=schedule, profile=True)
        run_matmul()
        results.append(emulator.last)
    first = results[0]
    for other in results[1:]:
        assert other.warp_instructions == first.warp_instructions
        assert other.program_instructions == first.program_instructions
        assert other.longest_warp == first.longest_warp
        assert other.opcodes == first.opcodes
        assert other.source_lines == first.source_lines
        assert other.barriers == first.barriers
        assert other.traffic == first.traffic
        assert other.footprint_bytes == first.footprint_bytes


def test_matmul_counts(emulate):
    emulator = emulate(80, schedule="lockstep", profile=True)
    run_matmul()
    stats = emulator.last
    assert stats.name == "matmul"
    assert stats.grid == (2, 2, 1)
    assert stats.tensor_flops == 2 * 128 * 128 * 64
    assert stats.mma == stats.tensor_flops // (2 * 16 * 8 * 16)
    assert stats.warp_instructions == sum(stats.opcodes.values())
    assert sum(stats.program_instructions.values()) == stats.warp_instructions
    assert stats.critical_path == max(stats.program_instructions.values())
    assert stats.longest_warp * 4 >= stats.critical_path
    # every program reads its rows of a and columns of b, and writes its tile of c
    assert stats.of("global", "load").bytes == 4 * (64 * 64 + 64 * 64) * 2
    assert stats.of("global", "store").bytes == 128 * 128 * 4
    assert stats.footprint_bytes == (2 * 128 * 64) * 2 + 128 * 128 * 4
    assert any(line.startswith("sample_kernels.py:") for line in stats.source_lines)
    assert "warp instructions" in stats.summary()


@pytest.mark.parametrize("schedule", ["interleave", "lockstep"])
@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (64, 32)])
def test_sectors_of_a_strided_load(emulate, schedule, stride, sectors):
    emulator = emulate(80, schedule=schedule, profile=True)
    kernels.strided_copy[(1,)](torch.randn(8192), torch.empty(128), stride, B=128)
    load, store = emulator.last.of("global", "load"), emulator.last.of("global", "store")
    # stride 1 is specialised into a wider vector load by some warps only
    if stride > 1:
        assert load.per_request == sectors
        assert (load.requests, load.bytes) == (4, 128 * 4)
    assert store.transactions == 128 * 4 // 32
    assert store.excess == 1.0


def test_bank_conflicts():
    import numpy as np
    from ptxemu.stats import count_wavefronts

    lanes = np.arange(32)
    assert count_wavefronts(lanes * 4, lanes, 4).transactions == 1
    assert count_wavefronts(lanes * 8, lanes, 4).transactions == 2
    assert count_wavefronts(lanes * 128, lanes, 4).transactions == 32
    assert count_wavefronts(lanes * 0, lanes, 4).transactions == 1
    assert count_wavefronts(lanes * 16, lanes, 16).transactions == 4
    assert count_wavefronts(lanes * 128, lanes, 16).transactions == 32
    two_warps = count_wavefronts(np.arange(64) * 4, np.arange(64), 4)
    assert (two_warps.requests, two_warps.transactions, two_warps.excess) == (2, 2, 1.0)


def test_roofline():
    stats = ptxemu.LaunchStats("k", (2, 1, 1), 4, 80, 0)
    stats.program_instructions = {(0, 0, 0): 4000, (1, 0, 0): 2000}
    stats.warp_instructions, stats.longest_warp = 6000, 1500
    stats.footprint_bytes = 1000
    stats.traffic = {("global", "load"): ptxemu.Traffic(10, 100, 50, 1600)}
    bounds = ptxemu.roofline(stats, sm_count=2, clock_hz=1e9, bandwidth=1e12)
    assert bounds.critical_path == pytest.approx(1500e-9)  # one warp issues once a clock
    assert bounds.issue_throughput == pytest.approx(6000 / 8 * 1e-9)
    assert bounds.compulsory_memory == pytest.approx(1e-9)
    assert bounds.sector_traffic == pytest.approx(3.2e-9)
    assert bounds.bound == "critical_path"
    assert bounds.seconds == bounds.critical_path
    assert stats.instruction_intensity == 60


def test_divergent_warps_count_once_per_path(emulate):
    emulator = emulate(80, schedule="sequential")
    flag, o = torch.ones(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    kernels.wait_for_other[(2,)](flag, o)
    first = emulator.last.program_instructions
    emulate(80, schedule="lockstep")
    kernels.wait_for_other[(2,)](flag, o)
    assert emulator.last.program_instructions == first
