"""Accuracy against visual tokens: places everything in percent of the plot's width and height.

The page's style sheet gives the plot its size, so one drawing fits a phone and a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = math.sqrt(2)  # free space beside the outermost points, a factor: tokens are on a log scale


@dataclass(frozen=True)
class Point:
    """A share of right answers, of 1, at a mean number of visual tokens.

    `interval` is its confidence interval, where there is one.
    """

    tokens: float
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A curve, or one point alone.

    Args:
        label: What it is called in the legend.
        slug: The policy whose colour it has, or "other".
        points: By rising tokens.
        dash: As in SVG's `stroke-dasharray`; empty for a solid curve.
    """

    label: str
    slug: str
    points: list[Point]
    dash: str = ""


@dataclass(frozen=True)
class Chart:
    """Where the ticks, curves and bands lie.

    Args:
        x_ticks: (place, label) of each; the place in percent from the left.
        y_ticks: (place, label) of each; the place in percent from the top.
        series: What was given.
        places: (x, y) of every point of every series.
        lines: SVG path data of each series with several points, in a 100 x 100 box; else "".
        bands: SVG path data of the intervals, likewise: an area for a curve, a line for a point.
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[Series]
    places: list[list[tuple[float, float]]]
    lines: list[str]
    bands: list[str]


def chart(series: Sequence[Series]) -> Chart:
    """Lays out at least one series, tokens on a logarithmic scale."""
    points = [point for one in series for point in one.points]
    left = math.log2(min(point.tokens for point in points) / MARGIN)
    right = math.log2(max(point.tokens for point in points) * MARGIN)
    lowest = min(min(point.interval or (point.value,)) for point in points)
    bottom = min(math.floor(lowest * 10), 9) / 10
    step = 10 if bottom >= 0.5 else 20  # percent

    def x(tokens: float) -> float:
        return round(100 * (math.log2(tokens) - left) / (right - left), 2)

    def y(share: float) -> float:
        return round(100 * (1 - share) / (1 - bottom), 2)

    def path(corners: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x(tokens)} {y(share)}" for tokens, share in corners)

    def band(points: list[Point]) -> str:
        ends = [(point.tokens, *point.interval) for point in points if point.interval]
        if not ends:
            return ""
        lows = [(tokens, low) for tokens, low, _ in ends]
        highs = [(tokens, high) for tokens, _, high in ends]
        return path([*lows, *reversed(highs)]) + "Z"

    return Chart(
        x_ticks=[
            (x(2**power), str(2**power))
            for power in range(max(math.ceil(left), 0), math.floor(right) + 1)
        ],
        y_ticks=[
            (y(percent / 100), f"{percent}%")
            for percent in range(100, round(100 * bottom) - 1, -step)
        ],
        series=list(series),
        places=[[(x(p.tokens), y(p.value)) for p in one.points] for one in series],
        lines=[
            path([(p.tokens, p.value) for p in one.points]) if len(one.points) > 1 else ""
            for one in series
        ],
        bands=[band(one.points) for one in series],
    )
