"""Kernels with one thing wrong in their source: does the suite's own check notice?

Each mutant is a copy of the folder `kernels` with one line changed, called in place of the kernel.
Single barriers of `prune_merge.py` are no mutants: where Triton's reductions synchronise anyway, or
where a thread reads back only what it wrote, the compiled code needs none, but nothing promises it.
"""

from __future__ import annotations

import gc
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import ptxemu
import pytest
import torch
from kernel_cases import (
    CONFIGS,
    assert_like_torch,
    assert_like_torch_but_not_finite,
    poison_new_memory,
    random_inputs,
    tied_inputs,
)
from prumerge_fast.kernels import prune_merge as original

from prumerge_fast.reduction.config import PruMergeConfig

KERNELS = Path(original.__file__).parent
NOTICED = (AssertionError, ptxemu.RaceDetected, ptxemu.MemoryAccessError, ptxemu.Deadlock)


DEFAULT, EVERYTHING = CONFIGS["default"], CONFIGS["everything"]
HALF = PruMergeConfig(keep=7, neighbours=10)
MOST = PruMergeConfig(keep=7, neighbours=17)  # of 19: the last token is among them
TIES = PruMergeConfig(keep=11, neighbours=5)


class Mutant(NamedTuple):
    """In `file`, every `old` becomes `new`; seen with `config` on inputs of a kind."""

    file: str
    old: str
    new: str
    config: PruMergeConfig = DEFAULT
    kind: Literal["random", "tied", "nan", "infinite key"] = "random"


QUICK = {
    "no barriers": Mutant("prune_merge", "tl.debug_barrier()", "pass"),
    "outliers below the fence": Mutant("selection", "attention > q3 +", "attention < q3 +"),
    "rows past the capacity": Mutant(
        "prune_merge", "mask=inside & (rows < capacity)[:, None]", "mask=inside", EVERYTHING
    ),
}
SLOW = {
    "no barrier before ranking": Mutant("selection", "tl.debug_barrier()", "pass"),
    "own token as neighbour": Mutant(
        "neighbours", "(tokens[None, :] != centres[:, None]) & (tokens < N)", "(tokens < N)"
    ),
    "ranking turned over": Mutant("selection", "theirs[None, :] > own", "theirs[None, :] < own"),
    "one tie too many": Mutant(
        "neighbours", "tl.sum(counts, 1) >= count", "tl.sum(counts, 1) > count", TIES, "tied"
    ),
    "ties to all": Mutant(
        "neighbours", "cosines > threshold[:, None]) |", "cosines >= threshold[:, None]) |",
        TIES, "tied",
    ),
    "more than k neighbours": Mutant("neighbours", "(reached >= count)", "(reached > count)"),
    "padding as neighbours": Mutant("neighbours", " & (tokens < N)[None, :]", "", MOST),
    "tokens past the end": Mutant(
        "tiles", "tl.minimum(tile * BLOCK_N + in_tile, N - 1)", "tile * BLOCK_N + in_tile"
    ),
    "channels past the end": Mutant("scores", ", mask=mask[None, None, :], other=0.0", ""),
    "centres in the supplement": Mutant(
        "prune_merge", "tl.where(attended | spatial, 0.0, attention)", "attention"
    ),
    "NaN in rows past the length": Mutant(
        "prune_merge", "merged = tl.where((rows < length)[:, None], merged, 0.0)", "pass",
        DEFAULT, "nan",
    ),
    "NaN among similarities": Mutant(
        "neighbours", "tl.where(cosines == cosines, tl.minimum(cosines, _LIMIT), _NAN_RANK)",
        "tl.minimum(cosines, _LIMIT)", HALF, "infinite key",
    ),
    "supplement left out": Mutant("prune_merge", "count + 1 if SUPPLEMENT", "count if SUPPLEMENT"),
}  # fmt: skip


def check(config: PruMergeConfig, kind: str) -> None:
    """A small part of test_kernel_emulator.py."""
    inputs = tied_inputs(torch.float16) if kind == "tied" else random_inputs(2, 20, 40, torch.half)
    poison_new_memory()
    try:
        with ptxemu.install(80, check_races="raise", max_instructions=2_000_000):
            if kind == "nan":
                inputs[2][0, 5] = torch.nan
                assert_like_torch_but_not_finite(inputs, config)
            elif kind == "infinite key":
                for value in (torch.inf, -torch.inf):
                    inputs[1][0, 7, 3] = value
                    assert_like_torch_but_not_finite(inputs, config)
            else:
                assert_like_torch(inputs, config, torch.float16)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder `kernels`, importable as the package `mutant`."""
    copy = tmp_path / "mutant"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    yield copy
    with ptxemu.install(80):  # compiled kernels ask for a driver when they are freed
        monkeypatch.undo()
        for name in [name for name in sys.modules if name.split(".")[0] == "mutant"]:
            del sys.modules[name]
        gc.collect()


@pytest.mark.parametrize(
    "mutant",
    [
        *(pytest.param(mutant, id=name) for name, mutant in QUICK.items()),
        *(pytest.param(mutant, id=name, marks=pytest.mark.slow) for name, mutant in SLOW.items()),
    ],
)
def test_mutant_is_noticed(kernels: Path, monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    file = kernels / f"{mutant.file}.py"
    source = file.read_text()
    assert mutant.old in source
    file.write_text(source.replace(mutant.old, mutant.new))
    module = importlib.import_module("mutant.prune_merge")
    monkeypatch.setattr(original, "prune_merge", module.prune_merge)
    with pytest.raises(NOTICED):
        check(mutant.config, mutant.kind)


def test_copy_without_a_mutation_passes(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mutant.prune_merge")
    assert Path(module.__file__).parent == kernels
    monkeypatch.setattr(original, "prune_merge", module.prune_merge)
    for config, kind in (
        (DEFAULT, "random"),
        (TIES, "tied"),
        (DEFAULT, "nan"),
        (HALF, "infinite key"),
    ):
        check(config, kind)
