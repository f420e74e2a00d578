"""Run by test_interpreter.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import sample_kernels as kernels
import torch
from ptxemu import Deadlock, MemoryAccessError
from ptxemu.interpreter import SCHEDULES, scheduled
from triton.runtime.errors import InterpreterError


def increments(kernel, *extra):
    total = torch.zeros(16, dtype=torch.int32)
    kernel[(10,)](*extra, total, 16)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results(schedule):
    x, y, o = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    with scheduled(schedule):
        kernels.add[(8,)](x, y, o, 1000, B=128)
    assert torch.equal(o, x + y)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lock(schedule):
    with scheduled(schedule, seed=3):
        total = increments(kernels.locked_increment, torch.zeros(1, dtype=torch.int32))
    assert (total == 10).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_last_program(schedule):
    x, parts, o = torch.randn(1024), torch.zeros(8), torch.zeros(1)
    with scheduled(schedule):
        ticket = torch.zeros(1, dtype=torch.int32)
        kernels.last_program_sums[(8,)](x, parts, ticket, o, "acq_rel", B=128, P=8)
    torch.testing.assert_close(o[0], x.sum(), atol=1e-3, rtol=0)


def test_lost_updates():
    with scheduled("interleave", seed=3):
        assert not (increments(kernels.unlocked_increment) == 10).all()
    assert (increments(kernels.unlocked_increment) == 10).all()


def test_waiting():
    flag, o = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with scheduled("interleave"):
        kernels.wait_for_other[(2,)](flag, o)
    assert o.tolist() == [42, 41]


def test_endless_waiting():
    with scheduled("interleave", max_switches=2000), pytest.raises(InterpreterError) as caught:
        increments(kernels.locked_increment, torch.ones(1, dtype=torch.int32))
    assert isinstance(caught.value.__cause__, Deadlock)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_out_of_bounds(schedule):
    with scheduled(schedule), pytest.raises(InterpreterError) as caught:
        kernels.unmasked_load[(3,)](torch.randn(300), torch.empty(300), 128)
    assert isinstance(caught.value.__cause__, MemoryAccessError)
    assert "of 'x' which has 1200" in str(caught.value.__cause__)
