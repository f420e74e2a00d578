"""Ways to reduce an image to a number of visual tokens, from the same encoded features.

At a budget of T tokens, every policy hands the language model exactly T of them: those with a
supplement choose T - 1 centres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge

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


@dataclass(frozen=True, eq=False)
class Encoded:
    """B images as the vision tower left them.

    Args:
        query: [B, C] of the class token.
        keys: [B, 1+N, C].
        hidden: [B, 1+N, C], the features; row 0 is the class token's.
        names: One for each image, which its random choices follow from.
    """

    query: Tensor
    keys: Tensor
    hidden: Tensor
    names: Sequence[str]


@dataclass(frozen=True)
class Policy:
    """One way to reduce images.

    Args:
        method: What it does.
        budget: T, the tokens of every image; `None` where the method decides.
        reduce: Features of B images to the tokens [m, C] of each, before the projector.
    """

    method: str
    budget: int | None
    reduce: Callable[[Encoded], list[Tensor]]

    @property
    def name(self) -> str:
        """Unique among the policies of an evaluation."""
        return self.method if self.budget is None else f"{self.method} ({self.budget})"


def policies(budgets: Sequence[int], patches: int) -> list[Policy]:
    """All tokens, PruMerge and PruMerge+ as each image decides, and all methods at each budget.

    Args:
        budgets: Tokens of an image.
        patches: N.

    Raises:
        ValueError: A budget is less than 2 or more than N.
    """
    for budget in budgets:
        if not 2 <= budget <= patches:
            raise ValueError(
                f"tokens: expected 2 to N = {patches}, the number of patch tokens of an image, "
                f"got {budget}"
            )
    found = [Policy(ALL_TOKENS, None, _all)]
    found += [
        Policy(f"{name}, adaptive", None, _by_config(_CONFIGS[name]))
        for name in (PRUMERGE, PRUMERGE_PLUS)
    ]
    for budget in budgets:
        found += [
            Policy(RANDOM, budget, _by_choice(random_patches, budget)),
            Policy(EVEN, budget, _by_choice(even_patches, budget)),
        ]
        found += [
            Policy(name, budget, _by_config(config.replace(keep=budget - config.supplement)))
            for name, config in _CONFIGS.items()
        ]
    return found


def random_patches(patches: int, count: int, name: str) -> list[int]:
    """`count` of `patches` patches in raster order, the same for the same `name`."""
    rng = np.random.default_rng([count, *name.encode(errors="surrogatepass")])
    return sorted(rng.choice(patches, count, replace=False).tolist())


def even_patches(patches: int, count: int, name: str = "") -> list[int]:
    """`count` patches on a grid as square as `count` allows, in raster order, for every `name`.

    The image's patches are a square; rows of the grid differ by one patch where it must.
    """
    side = math.isqrt(patches)
    rows = round(math.sqrt(count))
    chosen = []
    for i in range(rows):
        columns = (i + 1) * count // rows - i * count // rows
        start = side * ((2 * i + 1) * side // (2 * rows))
        chosen += [start + (2 * j + 1) * side // (2 * columns) for j in range(columns)]
    return chosen


def _all(encoded: Encoded) -> list[Tensor]:
    return list(encoded.hidden[:, 1:])


def _by_config(config: PruMergeConfig) -> Callable[[Encoded], list[Tensor]]:
    def reduce(encoded: Encoded) -> list[Tensor]:
        return prune_merge(encoded.query, encoded.keys, encoded.hidden, config).split()

    return reduce


def _by_choice(
    choose: Callable[[int, int, str], list[int]], budget: int
) -> Callable[[Encoded], list[Tensor]]:
    def reduce(encoded: Encoded) -> list[Tensor]:
        patches = encoded.hidden[:, 1:]  # [B, N, C]
        device = patches.device
        return [
            tokens[torch.tensor(choose(len(tokens), budget, name), device=device)]
            for tokens, name in zip(patches, encoded.names, strict=True)
        ]

    return reduce
