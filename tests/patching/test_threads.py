"""Models with different settings side by side: in turn, and in threads at once."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from tiny_models import PIXELS, PROMPTS, batch, tiny_llava

from prumerge_fast.patching.patch import is_patched, patch, patched

INPUTS: dict[str, Any] = {**batch(PROMPTS), "pixel_values": PIXELS}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"keep": 3},
    {"variant": "prumerge+", "keep": 9, "merge": "average"},
)
ROUNDS = 8


def models() -> list[Any]:
    """Of the same weights, so that a setting of the other's would not be noticed as a crash."""
    return [patch(tiny_llava(), **setting) for setting in SETTINGS]


@torch.no_grad()
def outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    logits = model(**INPUTS).logits
    return logits, model.generate(**INPUTS, max_new_tokens=3), model.prumerge.last_lengths


def test_in_turn() -> None:
    expected = [outputs(model) for model in models()]
    assert expected[0][2] != expected[1][2]
    both = models()
    for _ in range(2):
        for model, wanted in zip(both, expected, strict=True):
            torch.testing.assert_close(outputs(model), wanted)


def test_in_threads() -> None:
    expected = [outputs(model) for model in models()]
    together = Barrier(len(SETTINGS))

    def work(model: Any) -> list[Any]:
        found = []
        for _ in range(ROUNDS):
            together.wait()
            found.append(outputs(model))
        return found

    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        for rounds, wanted in zip(pool.map(work, models()), expected, strict=True):
            for found in rounds:
                torch.testing.assert_close(found, wanted)


def test_patching_in_threads() -> None:
    """One thread's `patched` block is nothing to a model, patched or not, of another."""
    plain, pruned = tiny_llava(), patch(tiny_llava(), keep=3)
    with torch.no_grad():
        expected = plain(**INPUTS).logits
        shrunk = pruned(**INPUTS).logits
    together = Barrier(2)

    def switch(model: Any) -> None:
        for _ in range(ROUNDS):
            together.wait()
            with patched(model, keep=7):
                outputs(model)
            assert not is_patched(model)

    @torch.no_grad()
    def stay(model: Any) -> list[torch.Tensor]:
        found = []
        for _ in range(ROUNDS):
            together.wait()
            found += [plain(**INPUTS).logits, model(**INPUTS).logits]
        return found

    with ThreadPoolExecutor(2) as pool:
        switching = pool.submit(switch, copy.deepcopy(plain))
        for i, found in enumerate(pool.submit(stay, pruned).result()):
            torch.testing.assert_close(found, shrunk if i % 2 else expected)
        switching.result()
