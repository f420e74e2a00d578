"""Orders of execution, deadlocks, memory errors and data races."""

from __future__ import annotations

import ptxemu
import pytest
import sample_kernels as kernels
import torch

SCHEDULES = ("interleave", "shuffle", "sequential", "lockstep")


def increments(kernel, *extra, programs=12):
    """One element a thread, so that no two warps load the same one."""
    total = torch.zeros(128, dtype=torch.int32)
    kernel[(programs,)](*extra, total, 128)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_agree(emulate, schedule):
    emulate(80, schedule=schedule)
    x = torch.randn(4, 300)
    o = torch.full_like(x, torch.nan)
    kernels.softmax[(4,)](x, o, 300, 300, B=512)
    torch.testing.assert_close(o, x.softmax(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tickets_are_unique(emulate, schedule):
    emulate(80, schedule=schedule, seed=3)
    index = torch.randint(0, 7, (2000,), dtype=torch.int32)
    counts, tickets = torch.zeros(7, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    kernels.counts_and_tickets[(8,)](index, counts, tickets, 2000, B=256)
    assert torch.equal(counts, torch.bincount(index, minlength=7).int())
    assert tickets[0] == 8
    assert sorted(tickets[1:].tolist()) == list(range(8))


def test_same_seed_same_run(emulate):
    def run(seed):
        emulate(80, seed=seed)
        return increments(kernels.unlocked_increment).tolist()

    assert run(5) == run(5)
    assert len({tuple(run(seed)) for seed in range(6)}) > 1


def test_lock_protects(emulate):
    emulate(80, schedule="interleave")
    lock = torch.zeros(1, dtype=torch.int32)
    assert (increments(kernels.locked_increment, lock) == 12).all()


def test_updates_are_lost_without_a_lock(emulate):
    emulate(80, schedule="interleave")
    assert not (increments(kernels.unlocked_increment) == 12).all()


@pytest.mark.parametrize("schedule", ["interleave", "lockstep"])
def test_programs_can_wait_for_each_other(emulate, schedule):
    emulate(80, schedule=schedule)
    flag, o = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    kernels.wait_for_other[(2,)](flag, o)
    assert o.tolist() == [42, 41]


def test_waiting_in_sequence_is_a_deadlock(emulate):
    emulate(80, schedule="sequential")
    flag, o = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ptxemu.Deadlock, match=r"nobody changes\n.*program \(0, 0, 0\)"):
        kernels.wait_for_other[(2,)](flag, o)


def test_everybody_waiting_is_a_deadlock(emulate):
    emulate(80, schedule="interleave")
    lock = torch.ones(1, dtype=torch.int32)  # taken, and never given back
    with pytest.raises(ptxemu.Deadlock, match="4 running program"):
        increments(kernels.locked_increment, lock, programs=4)


def test_instruction_budget(emulate):
    emulate(80, max_instructions=100)
    with pytest.raises(ptxemu.Deadlock, match="more than 100"):
        increments(kernels.unlocked_increment)


# ---- memory errors


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_load_past_the_end(emulate, schedule):
    emulate(80, schedule=schedule)
    with pytest.raises(ptxemu.MemoryAccessError) as caught:
        kernels.unmasked_load[(3,)](torch.randn(300), torch.empty(300), 128)
    text = str(caught.value)
    assert "'x' which has 1200" in text
    assert "in program (2, 0, 0)" in text
    assert "ld.global" in text
    assert "sample_kernels.py:" in text


def test_views_are_bounded_by_what_they_show(emulate):
    emulate(80)
    storage = torch.randn(512)
    with pytest.raises(ptxemu.MemoryAccessError):
        kernels.unmasked_load[(2,)](storage[:200], torch.empty(2), 128)
    o = torch.empty(1)
    kernels.unmasked_load[(1,)](storage[3:131], o, 128)
    torch.testing.assert_close(o[0], storage[3:131].sum(), atol=1e-4, rtol=0)


def test_misaligned_access(emulate):
    """Vector loads promise alignment, which a rewritten offset breaks."""
    emulate(80, rewrite_ptx=lambda ptx: ptx.replace(" + 0 ]", " + 4 ]"))
    x, y, o = (torch.zeros(1024) for _ in range(3))
    with pytest.raises(ptxemu.MemoryAccessError, match="not aligned to the 16 bytes"):
        kernels.add[(1,)](x, y, o, 1024, B=1024)


def test_unsupported_instruction_names_the_line(emulate):
    emulate(80, rewrite_ptx=lambda ptx: ptx.replace("add.f32", "wiggle.f32"))
    with pytest.raises(ptxemu.UnsupportedInstruction, match=r"wiggle[\s\S]*PTX line \d+: wiggle"):
        kernels.add[(1,)](*(torch.zeros(128) for _ in range(3)), 128, B=128)


# ---- data races


def test_race_between_programs(emulate):
    emulator = emulate(80, check_races=True)
    increments(kernels.unlocked_increment, programs=3)
    race = emulator.last.races[0]
    assert race.buffer == "total"
    assert race.between_programs
    assert "store" in (race.first_access, race.second_access)


def test_race_can_raise(emulate):
    emulate(80, check_races="raise")
    with pytest.raises(ptxemu.RaceDetected, match="of 'total' is not ordered after"):
        increments(kernels.unlocked_increment, programs=3)


@pytest.mark.parametrize("schedule", ["interleave", "lockstep"])
def test_a_lock_orders(emulate, schedule):
    emulator = emulate(80, schedule=schedule, check_races=True)
    increments(kernels.locked_increment, torch.zeros(1, dtype=torch.int32), programs=4)
    assert emulator.last.races == []


@pytest.mark.parametrize(("semantics", "clean"), [("acq_rel", True), ("relaxed", False)])
def test_only_acquire_release_orders(emulate, semantics, clean):
    emulator = emulate(80, check_races=True)
    x, parts, o = torch.randn(512), torch.zeros(4), torch.zeros(1)
    ticket = torch.zeros(1, dtype=torch.int32)
    kernels.last_program_sums[(4,)](x, parts, ticket, o, semantics, B=128, P=4)
    torch.testing.assert_close(o[0], x.sum(), atol=1e-4, rtol=0)
    assert (emulator.last.races == []) == clean


@pytest.mark.parametrize("barrier", [True, False])
def test_race_between_warps(emulate, barrier):
    emulator = emulate(80, check_races=True)
    x, scratch, o = torch.randn(256), torch.zeros(256), torch.zeros(256)
    kernels.through_scratch[(1,)](x, scratch, o, B=256, BARRIER=barrier)
    assert (emulator.last.races == []) == barrier
    if barrier:
        assert torch.equal(o, x.flip(0))


def test_correct_kernels_are_free_of_races(emulate):
    emulator = emulate(80, check_races=True)
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64)
    kernels.matmul[(2, 2)](a, b, c, 64, 64, 64, BM=32, BN=32, BK=16, num_stages=3)
    assert emulator.last.races == []
    x = torch.randn(512)
    kernels.cumsum[(1,)](x, torch.empty(512), 512)
    assert emulator.last.races == []
    kernels.sort[(1,)](x, torch.empty(512), 512)
    assert emulator.last.races == []
    bins = torch.empty(64, dtype=torch.int32)
    kernels.histogram[(1,)](torch.randint(0, 64, (512,), dtype=torch.int32), bins, 512, 64)
    assert emulator.last.races == []
