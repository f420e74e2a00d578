"""Ways to reduce an image to a number of visual tokens, from the same encoded features.

At a budget of T tokens, every policy leaves exactly T of them of each image, crop or frame (all of
one that has fewer): those with a supplement choose T - 1 centres. How the model puts them together,
with newlines or class tokens, is its family's business.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.reading import Patches, reduce_patches

ALL_TOKENS = "all tokens"
RANDOM = "random"
EVEN = "evenly spaced"
PRUMERGE = "PruMerge"
PRUMERGE_PLUS = "PruMerge+"
TOP_K = "attention top-k"
TOP_K_MERGE = "attention top-k + merge"
# The paper's ablation, step by step: selection, merge, supplement (which is PruMerge).
ABLATION = (TOP_K, TOP_K_MERGE, PRUMERGE)

# What PruMergeConfig says about each of them, but for `keep`.
_CONFIGS: dict[str, PruMergeConfig] = {
    TOP_K: PruMergeConfig(merge="none", supplement=False),
    TOP_K_MERGE: PruMergeConfig(supplement=False),
    PRUMERGE: PruMergeConfig(),
    "PruMerge, raster order": PruMergeConfig(order="raster"),
    "PruMerge, weighted average": PruMergeConfig(merge="average"),
    PRUMERGE_PLUS: PruMergeConfig(variant="prumerge+"),
    "PruMerge+, raster order": PruMergeConfig(variant="prumerge+", order="raster"),
}
METHODS = (RANDOM, EVEN, *_CONFIGS)
"""Methods that are compared at equal budgets."""

# What is subtracted from what, at equal budgets: ours from the simple ones, and each ablation step.
_PAIRS_OF_METHODS = (
    *((ours, other) for ours in (PRUMERGE, PRUMERGE_PLUS) for other in (RANDOM, EVEN, TOP_K)),
    *zip(ABLATION[1:], ABLATION, strict=False),
)


def _scorings() -> dict[str, PruMergeConfig]:
    """What patches are scored by, and where tokens stand, of both variants."""
    found = {}
    for name in (PRUMERGE, PRUMERGE_PLUS):
        config = _CONFIGS[name]
        for scores, heads in itertools.product(("class", "received"), ("joint", "separate")):
            scored = config.replace(scores=scores, heads=heads)
            found[f"{name}, {scores}, {heads}"] = scored
        original = config.replace(positions="original")
        found[f"{name}, original positions"] = original
        found[f"{name}, raster order"] = config.replace(order="raster")
        found[f"{name}, raster order, original positions"] = original.replace(order="raster")
    return found


def _pairs_of_scorings(class_token: bool) -> list[tuple[str, str]]:
    found = []
    for name in (PRUMERGE, PRUMERGE_PLUS):
        received = (f"{name}, received, separate", f"{name}, received, joint")
        by_class = (f"{name}, class, joint", f"{name}, class, separate")
        default = by_class[0] if class_token else received[0]
        raster = f"{name}, raster order"
        found += [
            (received[0], by_class[0]),
            (by_class[1], by_class[0]),
            (received[1], received[0]),
            (f"{name}, original positions", default),
            (f"{raster}, original positions", raster),
        ]
    return found if class_token else [pair for pair in found if not any("class" in p for p in pair)]


_CHOICE = PruMergeConfig(merge="none", supplement=False, order="raster")
_EVERYTHING = _CHOICE.replace(keep=1.0)

Reduce = Callable[[Patches, PruMergeConfig, str], MergedTokens]
"""What reduces patches, called as `reduce_patches` is."""


@dataclass(frozen=True)
class Policy:
    """One way to reduce images.

    Args:
        method: What it does.
        budget: T, the tokens of every image, crop or frame; `None` where the method decides.
        config: What `reduce_patches` is told; its order is that of the model's tokens.
        choose: What chooses patches in place of `reduce_patches`, of n patches so many for an image
            of that name.
    """

    method: str
    budget: int | None
    config: PruMergeConfig
    choose: Callable[[int, int, str], list[int]] | None = None

    @property
    def name(self) -> str:
        """Unique among the policies of an evaluation."""
        return self.method if self.budget is None else f"{self.method} ({self.budget})"

    def reduction(self, names: Sequence[str]) -> Reduce:
        """What reduces the images or videos of these names; called as `reduce_patches` is."""
        if self.choose is None or self.budget is None:
            return reduce_patches
        return _choosing(self.choose, self.budget, names)


class Comparison(NamedTuple):
    """Policies, and the methods whose differences at equal budgets are of interest."""

    policies: list[Policy]
    pairs: Sequence[tuple[str, str]]


def methods(budgets: Sequence[int], patches: int) -> Comparison:
    """All tokens, PruMerge and PruMerge+ as each image decides, and all methods at each budget.

    Args:
        budgets: Tokens of an image, a crop or a frame.
        patches: N.

    Raises:
        ValueError: A budget is less than 2 or more than N.
    """
    _check_budgets(budgets, patches)
    found = [Policy(ALL_TOKENS, None, _EVERYTHING)]
    found += [
        Policy(f"{name}, adaptive", None, _CONFIGS[name]) for name in (PRUMERGE, PRUMERGE_PLUS)
    ]
    for budget in budgets:
        found += [
            Policy(RANDOM, budget, _CHOICE.replace(keep=budget), random_patches),
            Policy(EVEN, budget, _CHOICE.replace(keep=budget), even_patches),
        ]
        found += _at(budget, _CONFIGS)
    return Comparison(found, _PAIRS_OF_METHODS)


def scorings(budgets: Sequence[int], patches: int, *, class_token: bool) -> Comparison:
    """All tokens, and both variants at each budget by every score and with either positions.

    Args:
        budgets: Tokens of an image, a crop or a frame.
        patches: N.
        class_token: Whether the vision tower has one, which can score patches.

    Raises:
        ValueError: A budget is less than 2 or more than N.
    """
    _check_budgets(budgets, patches)
    configs = {
        name: config
        for name, config in _scorings().items()
        if class_token or config.scores != "class"
    }
    found = [Policy(ALL_TOKENS, None, _EVERYTHING)]
    for budget in budgets:
        found += _at(budget, configs)
    return Comparison(found, _pairs_of_scorings(class_token))


def _at(budget: int, configs: Mapping[str, PruMergeConfig]) -> list[Policy]:
    return [
        Policy(name, budget, config.replace(keep=budget - bool(config.supplement)))
        for name, config in configs.items()
    ]


def _check_budgets(budgets: Sequence[int], patches: int) -> None:
    for budget in budgets:
        if not 2 <= budget <= patches:
            raise ValueError(
                f"tokens: expected 2 to N = {patches}, the number of patch tokens of an image, "
                f"got {budget}"
            )


def random_patches(patches: int, count: int, name: str) -> list[int]:
    """`count` of `patches` patches in raster order, the same for the same `name`."""
    rng = np.random.default_rng([count, *name.encode(errors="surrogatepass")])
    return sorted(rng.choice(patches, count, replace=False).tolist())


def even_patches(patches: int, count: int, name: str = "") -> list[int]:
    """`count` patches on a grid as square as `count` allows, in raster order, for every `name`.

    The image's patches are a square; rows of the grid differ by one patch where it must. Of a crop
    with padding, whose patches are none, they are evenly spaced in raster order.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        return [(2 * i + 1) * patches // (2 * count) for i in range(count)]
    rows = round(math.sqrt(count))
    chosen = []
    for i in range(rows):
        columns = (i + 1) * count // rows - i * count // rows
        start = side * ((2 * i + 1) * side // (2 * rows))
        chosen += [start + (2 * j + 1) * side // (2 * columns) for j in range(columns)]
    return chosen


def _choosing(
    choose: Callable[[int, int, str], list[int]], budget: int, names: Sequence[str]
) -> Reduce:
    """Patches by choice, called as `reduce_patches` is: once, or for some crops at a time."""
    calls = itertools.count()

    def reduce(patches: Patches, config: PruMergeConfig, backend: str) -> MergedTokens:
        features = patches.features  # [K, n, C]
        images, count = features.shape[:2]
        kept = torch.tensor(
            [
                choose(count, min(budget, count), name)
                for name in _names_of_rows(names, images, next(calls))
            ]
        ).to(features.device)  # [K, T]
        tokens = features.gather(1, kept[..., None].expand(-1, -1, features.shape[2]))
        lengths = torch.full_like(kept[:, 0], kept.shape[1], dtype=torch.int32)
        return MergedTokens(tokens, lengths, kept.int(), features.new_zeros(images, count))

    return reduce


def _names_of_rows(names: Sequence[str], rows: int, call: int) -> list[str]:
    """One for each image, and for each of several crops or frames another."""
    each, rest = divmod(rows, len(names))
    if (each, rest, call) == (1, 0, 0):
        return list(names)
    if rest:
        return [f"{' '.join(names)} {call} {row}" for row in range(rows)]
    return [f"{names[row // each]} {call} {row % each}" for row in range(rows)]
