"""Scores of answers, with bootstrap intervals.

Every measure is a ratio of two sums over questions, so a resample needs only weighted sums. Images
are resampled, not questions, because questions about one image are not independent; all policies
share each resample, so that differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prumerge_fast.harness.answers import normalise

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
_CHUNK = 100  # resamples at once: bounds memory on large question files
POPE_MEASURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass(frozen=True, eq=False)
class Measure:
    """A ratio of sums over n questions, for each of P policies.

    Args:
        numerator: [P, n].
        denominator: [P, n].
    """

    numerator: np.ndarray
    denominator: np.ndarray

    def value(self) -> np.ndarray:
        """[P]; NaN where the denominator is 0."""
        return _ratio(self.numerator.sum(1), self.denominator.sum(1))

    def of(self, questions: np.ndarray) -> Measure:
        """The same over some of the questions [n] bool."""
        return Measure(self.numerator[:, questions], self.denominator[:, questions])

    def only(self, questions: np.ndarray) -> Measure:
        """The same, with the other questions [n] bool counting nothing.

        What is left out keeps its images, which parts of one measure then share in each resample.
        """
        return Measure(self.numerator * questions, self.denominator * questions)

    def resampled(self, images: Sequence[str]) -> np.ndarray:
        """[RESAMPLES, P], the value in each bootstrap resample of the images [n] asked about."""
        _, image = np.unique(np.asarray(images), return_inverse=True)
        count = int(image.max()) + 1
        sums = [
            np.stack([np.bincount(image, row, count) for row in values])  # [P, images]
            for values in (self.numerator, self.denominator)
        ]
        rng = np.random.default_rng(SEED)
        found = []
        for start in range(0, RESAMPLES, _CHUNK):
            size = min(_CHUNK, RESAMPLES - start)
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=size)  # [size, images]
            found.append(_ratio(drawn @ sums[0].T, drawn @ sums[1].T))
        return np.concatenate(found)


def interval(resamples: np.ndarray) -> list[float]:
    """The percentile interval of resampled values [R]."""
    outside = 50 * (1 - LEVEL)
    return [float(end) for end in np.nanpercentile(resamples, [outside, 100 - outside])]


def exact_match(answers: Sequence[Sequence[str]], expected: Sequence[str]) -> Measure:
    """Answers [P][n] against the right ones [n], both normalised as `compare` does."""
    right = [normalise(answer) for answer in expected]
    correct = [
        [normalise(said) == want for said, want in zip(row, right, strict=True)] for row in answers
    ]
    numerator = np.asarray(correct, dtype=float)
    return Measure(numerator, np.ones_like(numerator))


def is_yes_no(expected: str) -> bool:
    """Whether a question counts for POPE's measures: the right answer is yes or no."""
    return normalise(expected) in ("yes", "no")


def says_yes(answer: str) -> bool:
    """How POPE's script (as LLaVA's `eval_pope.py`) reads an answer: yes unless its first sentence
    holds the word no or not."""
    words = answer.split(".")[0].replace(",", "").split()
    return not any(word in ("No", "not", "no") for word in words)


def pope(answers: Sequence[Sequence[str]], expected: Sequence[str]) -> dict[str, Measure]:
    """POPE's measures (arXiv 2305.10355) over questions whose right answer is yes or no."""
    predicted = np.asarray([[says_yes(said) for said in row] for row in answers], dtype=float)
    wanted = np.asarray([normalise(answer) == "yes" for answer in expected], dtype=float)
    wanted = np.broadcast_to(wanted, predicted.shape)
    hits, ones = predicted * wanted, np.ones_like(predicted)
    return {
        "accuracy": Measure((predicted == wanted).astype(float), ones),
        "precision": Measure(hits, predicted),
        "recall": Measure(hits, wanted),
        "f1": Measure(2 * hits, predicted + wanted),
        "yes_ratio": Measure(predicted, ones),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    nothing = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=nothing, where=denominator != 0)
