"""Kernels with one thing wrong in their source: does the suite's own check notice?

Each mutant is a copy of the folder `kernels` with one line changed, called in place of the kernel.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ptxemu
import pytest
import torch
from kernel_cases import (
    CONFIGS,
    assert_like_torch,
    poison_new_memory,
    random_inputs,
    tied_inputs,
)
from prumerge_fast.kernels import prune_merge as original

KERNELS = Path(original.__file__).parent
NOTICED = (AssertionError, ptxemu.RaceDetected, ptxemu.MemoryAccessError, ptxemu.Deadlock)


class Mutant(NamedTuple):
    """In `file`, the text `old` (the only one, or the `number`-th) becomes `new`."""

    file: str
    old: str
    new: str
    config: str = "default"  # of `CONFIGS`
    tied: bool = False  # keys that tie exactly
    number: int | None = None


def barrier(file: str, number: int, config: str = "default") -> Mutant:
    return Mutant(file, "tl.debug_barrier()", "pass", config, number=number)


QUICK = {
    "barrier after the scores": barrier("prune_merge", 0),
    "outliers below the fence": Mutant("selection", "attention > q3 +", "attention < q3 +"),
    "own token as neighbour": Mutant(
        "neighbours", "(tokens[None, :] != centres[:, None]) & (tokens < N)", "(tokens < N)"
    ),
    "rows past the capacity": Mutant(
        "prune_merge", "mask=inside & (rows < capacity)[:, None]", "mask=inside"
    ),
}
SLOW = {
    "barrier after the centres": barrier("prune_merge", 1),
    "barrier after the similarities": barrier("prune_merge", 2),
    "barrier after the weights": barrier("prune_merge", 3),
    "barrier between tiles": barrier("prune_merge", 4, "plus-none"),
    "barrier before ranking": barrier("selection", 0),
    "ranking turned over": Mutant("selection", "theirs[None, :] > own", "theirs[None, :] < own"),
    "ties to none": Mutant(
        "neighbours", "tokens[None, :] <= last", "tokens[None, :] < last", tied=True
    ),
    "ties to all": Mutant(
        "neighbours", "cosines > threshold[:, None]) |", "cosines >= threshold[:, None]) |",
        tied=True,
    ),
    "more than k neighbours": Mutant("neighbours", "(reached >= count)", "(reached > count)"),
    "padding as neighbours": Mutant("neighbours", " & (tokens < N)[None, :]", ""),
    "tokens past the end": Mutant("tiles", "tl.minimum(tile * BLOCK_N + in_tile, N - 1)",
                                  "tile * BLOCK_N + in_tile"),
    "channels past the end": Mutant("scores", "mask=mask[None, None, :], other=0.0", ""),
    "centres in the supplement": Mutant(
        "prune_merge", "tl.where(attended | spatial, 0.0, attention)", "attention"
    ),
    "rows that are not zeroed": Mutant(
        "prune_merge", "merged = tl.where((rows < length)[:, None], merged, 0.0)", "pass"
    ),
    "supplement left out": Mutant("prune_merge", "count + 1 if SUPPLEMENT", "count if SUPPLEMENT"),
}  # fmt: skip


def check(config: str, tied: bool) -> None:
    """A small part of test_kernel_emulator.py."""
    poison_new_memory()
    inputs = tied_inputs(torch.float16) if tied else random_inputs(2, 20, 40, torch.float16)
    try:
        with ptxemu.install(80, check_races="raise", max_instructions=2_000_000):
            assert_like_torch(inputs, CONFIGS[config], torch.float16)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder `kernels`, importable as the package `mutant`."""
    copy = tmp_path / "mutant"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    yield copy
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "mutant",
    [
        *(pytest.param(mutant, id=name) for name, mutant in QUICK.items()),
        *(pytest.param(mutant, id=name, marks=pytest.mark.slow) for name, mutant in SLOW.items()),
    ],
)
def test_mutant_is_noticed(kernels: Path, monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    file = kernels / f"{mutant.file}.py"
    parts = file.read_text().split(mutant.old)
    assert len(parts) == 2 or mutant.number is not None
    at = 1 + (mutant.number or 0)
    file.write_text(mutant.old.join(parts[:at]) + mutant.new + mutant.old.join(parts[at:]))
    module = importlib.import_module("mutant.prune_merge")
    monkeypatch.setattr(original, "prune_merge", module.prune_merge)
    with pytest.raises(NOTICED):
        check(mutant.config, mutant.tied)


def test_copy_without_a_mutation_passes(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mutant.prune_merge")
    assert Path(module.__file__).parent == kernels
    monkeypatch.setattr(original, "prune_merge", module.prune_merge)
    check("default", tied=False)


def test_every_barrier_has_its_mutant() -> None:
    mutants = [mutant for mutant in (*QUICK.values(), *SLOW.values()) if mutant.new == "pass"]
    for file in ("prune_merge", "selection"):
        barriers = (KERNELS / f"{file}.py").read_text().count("tl.debug_barrier()")
        tested = {m.number for m in mutants if m.file == file and m.number is not None}
        assert tested == set(range(barriers))
