"""What the demo's vision tower learns: the set of objects, and what each patch shows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prumerge_fast.demo import recipe
from prumerge_fast.demo.scenes import COLOURS, MAX_COUNT, SHAPES, Scene

PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class SetPrediction(nn.Module):
    """Linear heads and their losses; thrown away once the tower is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, len(COLOURS) + 1 + len(SHAPES) + 1 + 1 + 2)
        self.counts = nn.Linear(width, len(PAIRS) * (MAX_COUNT + 1))
        self.places = nn.Linear(width, len(PAIRS) * 2)

    def forward(self, hidden: Tensor, pooled: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
        """Losses from the feature layer [B, 1+N, C] and the class token's output [B, C]."""
        colours, shapes, centres, xy = patch_targets(scenes)
        sizes = [len(COLOURS) + 1, len(SHAPES) + 1, 1, 2]
        patch = self.patch(self.patch_norm(hidden[:, 1:])).float().split(sizes, -1)  # 4 x [B, N, .]
        seen = colours > 0  # [B, N]
        counts, places = set_targets(scenes)
        present = counts > 0  # [B, pairs]
        count_loss = F.cross_entropy(
            self.counts(pooled).float().view(-1, MAX_COUNT + 1), counts.flatten(), reduction="none"
        ).view_as(counts)
        place_error = (self.places(pooled).float().view_as(places) - places).square().sum(-1)
        return {
            "set": (count_loss * (1 + 4 * present)).sum(1).mean() / 8,
            "place": 4 * place_error[present].mean(),
            "colour": _balanced_entropy(patch[0], colours),
            "shape": _balanced_entropy(patch[1], shapes),
            "centre": F.binary_cross_entropy_with_logits(patch[2].squeeze(-1)[seen], centres[seen]),
            "xy": 4 * (patch[3] - xy).square().sum(-1)[seen].mean(),
        }


def _balanced_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the background (label 0) weighted down: it fills most of the picture."""
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.15
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight=weight)


def patch_targets(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per patch: colour and shape (0 is background) [B, N], centre flag [B, N], place [B, N, 2]."""
    colours = np.zeros((len(scenes), recipe.GRID, recipe.GRID), np.int64)
    shapes, centres = np.zeros_like(colours), np.zeros(colours.shape, np.float32)
    places = np.zeros((*colours.shape, 2), np.float32)
    for b, scene in enumerate(scenes):
        for item in scene.objects:
            low_x, high_x = _patch_range(item.x, item.radius)
            low_y, high_y = _patch_range(item.y, item.radius)
            area = np.s_[b, low_y:high_y, low_x:high_x]
            colours[area] = 1 + list(COLOURS).index(item.colour)
            shapes[area] = 1 + SHAPES.index(item.shape)
            places[area] = item.x, item.y
            centres[b, int(item.y * recipe.GRID), int(item.x * recipe.GRID)] = 1
    flat = (len(scenes), recipe.GRID * recipe.GRID)
    return (
        torch.from_numpy(colours).view(flat),
        torch.from_numpy(shapes).view(flat),
        torch.from_numpy(centres).view(flat),
        torch.from_numpy(places).view(*flat, 2),
    )


def _patch_range(centre: float, radius: float) -> tuple[int, int]:
    """The patches along one axis whose centres lie within an object's box."""
    return math.ceil((centre - radius) * recipe.GRID - 0.5), math.floor(
        (centre + radius) * recipe.GRID - 0.5
    ) + 1


def set_targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Per scene and pair: how many there are [B, pairs] and their mean place [B, pairs, 2]."""
    counts = torch.zeros(len(scenes), len(PAIRS), dtype=torch.long)
    places = torch.zeros(len(scenes), len(PAIRS), 2)
    for b, scene in enumerate(scenes):
        for pair in scene.pairs:
            found = [item for item in scene.objects if item.pair == pair]
            p = PAIRS.index(pair)
            counts[b, p] = min(len(found), MAX_COUNT)
            places[b, p] = torch.tensor([(item.x, item.y) for item in found]).mean(0)
    return counts, places
