"""Ahead-of-time resource reports."""

import ptxemu
import pytest
import sample_kernels as kernels
import torch


def test_matmul_on_several_targets():
    half, single = torch.float16, torch.float32
    reports = ptxemu.compile_resources(
        kernels.matmul,
        half, half, single, 128, 128, 128,
        BM=64, BN=64, BK=32, num_warps=4, num_stages=3,
        targets=(80, "sm_90", "gfx942", "gfx1100"),
    )  # fmt: skip
    assert list(reports) == ["sm_80", "sm_90", "gfx942", "gfx1100"]
    for target, report in reports.items():
        assert report.target == target
        assert 16 < report.registers <= 512
        assert report.spills == 0
        assert report.stack == 0
        assert report.shared >= 8192
        assert report.binary_size > 4096


def test_spilling_is_reported():
    single = torch.float32
    (report,) = ptxemu.compile_resources(
        kernels.dot, single, single, single, 64, 128, 16, "ieee", num_warps=1, targets=(80,)
    ).values()
    assert report.spills > 0
    assert report.stack == 4 * report.spills


def test_the_previous_driver_is_kept(emulate):
    emulator = emulate(80)
    ptxemu.compile_resources(kernels.cumsum, torch.zeros(64), torch.zeros(64), 64, targets=(89,))
    o = torch.empty(64)
    kernels.cumsum[(1,)](torch.ones(64), o, 64)
    assert emulator.last.capability == 80
    assert o[-1] == 64


def test_install_and_uninstall_nest():
    with ptxemu.install(80) as outer:
        with ptxemu.install(120) as inner:
            kernels.cumsum[(1,)](torch.ones(64), torch.empty(64), 64)
        kernels.cumsum[(1,)](torch.ones(64), torch.empty(64), 64)
    assert (outer.last.capability, inner.last.capability) == (80, 120)


@pytest.mark.parametrize("option", [{"schedule": "backwards"}, {"check_races": "maybe"}])
def test_wrong_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ptxemu.install(80, **option)
