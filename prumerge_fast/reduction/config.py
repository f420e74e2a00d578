"""What to keep and how to merge: every option of LLaVA-PruMerge in one frozen object."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Literal, NamedTuple, get_args

Variant = Literal["prumerge", "prumerge+"]
Merge = Literal["sum", "average", "none"]
Supplement = bool | Literal["image"]
Order = Literal["attention", "raster"]
Scores = Literal["auto", "class", "received"]
Heads = Literal["auto", "joint", "separate"]
Positions = Literal["compact", "original"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "variant": get_args(Variant),
    "merge": get_args(Merge),
    "order": get_args(Order),
    "scores": get_args(Scores),
    "heads": get_args(Heads),
    "positions": get_args(Positions),
}


class Scoring(NamedTuple):
    """What scores the patches of a tower.

    Args:
        received: The attention that a patch receives from all patches, not that of the class token.
        separate: The mean over the heads, not one head over the full width.
    """

    received: bool
    separate: bool


@dataclasses.dataclass(frozen=True)
class PruMergeConfig:
    """Options of the token reduction (LLaVA-PruMerge, arXiv 2403.15388, Algorithm 1).

    A *centre* is a patch token that is kept; N is the number of patch tokens of an image.

    Args:
        variant: `"prumerge"` keeps the tokens of the highest scores (by default, those that the
            class token attends to most); `"prumerge+"` adds tokens spread evenly over the image.
        keep: How many centres an image keeps. `None`: as many as are outliers of its
            scores, so the number differs from image to image. An `int` >= 1: that many
            (at most N; checked when N is known). A `float` in (0, 1]: that share of N, rounded
            to the nearest whole number, halves up, but at least 1.
            The type decides: `keep=1` is one token, `keep=1.0` is every token.
        neighbours: How many of the other tokens, the most similar by key, merge into each
            centre; clipped to N - 1. Without effect when `merge="none"`.
        fence: Outliers lie above `Q3 + fence * (Q3 - Q1)` of the image's scores. Without effect
            when `keep` is given.
        merge: `"sum"`: `y_p + Σ a_j y_j` over the neighbours, as in the authors' code.
            `"average"`: `(a_p y_p + Σ a_j y_j) / (a_p + Σ a_j)`, as in the paper's text; where
            those weights are all zero the centre stays `y_p`. `"none"`: `y_p` as it is.
        supplement: Append one last row per image, `Σ a_j y_j` over every token that is no
            centre (a zero row when every token is a centre). Of images that a model cuts into
            crops each crop has its own; `"image"`: the image has one, their mean, as if attention
            over the image were the mean of its crops'. Frames of a video have one each either way.
        order: Centres in the order in which they were chosen (`"attention"`: descending
            scores, then the spatial tokens of `"prumerge+"` in raster order) or all of them
            by patch index (`"raster"`). The supplement is last either way.
        scores: What says how much a patch matters: the attention that the class token pays to it
            (`"class"`), or the mean of what it receives from all patches (`"received"`), which is
            flat: give it a `keep`, for hardly a patch is an outlier. `"auto"`: the first, where
            the tower has a class token.
        heads: `"joint"`: one head over the full width, as in the authors' code; `"separate"`: the
            mean over the layer's own heads. `"auto"`: joint for the class token's attention,
            separate for what is received.
        positions: Where the language model takes tokens to stand, and what follows them.
            `"compact"`: it counts the tokens that are left, as in the authors' code. `"original"`:
            each stands in its place in the whole prompt, so that distances stay as they were.
            `prune_merge` itself knows no positions.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.
    """

    variant: Variant = "prumerge"
    keep: int | float | None = None
    neighbours: int = 32
    fence: float = 1.5
    merge: Merge = "sum"
    supplement: Supplement = True
    order: Order = "attention"
    scores: Scores = "auto"
    heads: Heads = "auto"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        # Frozen: plain Python numbers replace NumPy's, so that equality, repr and JSON are uniform.
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        object.__setattr__(self, "neighbours", _checked_neighbours(self.neighbours))
        object.__setattr__(self, "fence", _checked_fence(self.fence))
        expected = f"supplement: expected True, False or 'image', got {_describe(self.supplement)}"
        if not isinstance(self.supplement, (bool, str)):
            raise TypeError(expected)
        if self.supplement not in (True, False, "image"):
            raise ValueError(expected)

    def budget(self, num_patches: int) -> int | None:
        """Number of centres that an image of `num_patches` patch tokens keeps.

        Returns:
            That number, or `None` when the image decides (`keep=None`).

        Raises:
            ValueError: `keep` is larger than `num_patches`.
        """
        if self.keep is None:
            return None
        if isinstance(self.keep, float):
            return max(1, math.floor(self.keep * num_patches + 0.5))
        if self.keep > num_patches:
            raise ValueError(
                f"keep: expected at most N = {num_patches}, the number of patch tokens "
                f"of an image, got {self.keep}"
            )
        return self.keep

    def capacity(self, num_patches: int) -> int:
        """Largest number of output rows, supplement included, that an image can have.

        Raises:
            ValueError: `keep` is larger than `num_patches`.
        """
        budget = self.budget(num_patches)
        return (num_patches if budget is None else budget) + bool(self.supplement)

    def scoring(self, *, class_token: bool = True) -> Scoring:
        """What scores the patches of a tower with or without a class token.

        Raises:
            ValueError: `scores="class"` without a class token.
        """
        if self.scores == "class" and not class_token:
            raise ValueError(
                "scores: expected 'auto' or 'received' for a vision tower without a class token, "
                "got 'class'"
            )
        received = self.scores == "received" or not class_token
        separate = self.heads == "separate" or (self.heads == "auto" and received)
        return Scoring(received, separate)

    def replace(self, **fields: Any) -> PruMergeConfig:
        """A copy with some options changed.

        Raises:
            TypeError: There is no option of that name, or a value has the wrong type.
            ValueError: A value is out of range.
        """
        names = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in fields if name not in names]
        if unknown:
            raise TypeError(
                f"PruMergeConfig has no option {', '.join(map(repr, unknown))}; "
                f"its options are {', '.join(names)}"
            )
        return dataclasses.replace(self, **fields)


def _describe(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    expected = f"{name}: expected {' or '.join(map(repr, choices))}, got {_describe(value)}"
    if not isinstance(value, str):
        raise TypeError(expected)
    if value not in choices:
        raise ValueError(expected)


def _checked_keep(value: Any) -> int | float | None:
    if value is None:
        return None
    expected = (
        "keep: expected None, an int >= 1 (tokens) or a float in (0, 1] (share of the tokens), "
        f"got {_describe(value)}"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(expected)
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ValueError(expected)
        return int(value)
    share = float(value)
    if not 0.0 < share <= 1.0:
        raise ValueError(expected)
    return share


def _checked_neighbours(value: Any) -> int:
    expected = f"neighbours: expected an int >= 1, got {_describe(value)}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(expected)
    if value < 1:
        raise ValueError(expected)
    return int(value)


def _checked_fence(value: Any) -> float:
    expected = f"fence: expected a finite number >= 0, got {_describe(value)}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(expected)
    fence = float(value)
    if not 0.0 <= fence < math.inf:
        raise ValueError(expected)
    return fence
