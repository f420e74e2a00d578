"""What policies answer, and what that sums up to."""

from __future__ import annotations

import statistics
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prumerge_fast.harness.inputs import Item
from prumerge_fast.harness.stages import StageTimes

STAGES = {
    "vision": "vision tower",
    "prune_merge": "prune+merge",
    "projector": "projector",
    "prefill": "prefill",
    "decode": "decode",
    "total": "total",
}


@dataclass(frozen=True)
class Answer:
    """What one policy said to one question. `cache_bytes` is its share of the batch's KV cache."""

    item: Item
    text: str
    visual_tokens: int
    cache_bytes: float


def normalise(answer: str) -> str:
    """An answer as it is compared.

    Lower case, single spaces, no punctuation and no quotes at either end, no leading article.
    """
    words = answer.lower().strip(string.punctuation + string.whitespace).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def summarise(
    answers: Sequence[Answer], times: Sequence[StageTimes], baseline: Sequence[Answer]
) -> dict[str, Any]:
    """One policy's row of results.

    Args:
        answers: To all questions, one at least.
        times: Seconds per question, one entry for each timed batch; none where all answers were on
            file.
        baseline: The unpruned model's answers, in the same order.

    Returns:
        `visual_tokens` (mean, min, max of an image), `milliseconds` (median per question, by
        stage; `None` for a stage that does not exist or was not timed), `kv_cache_bytes` (mean per
        question), `agreement` with the baseline and `accuracy` (overall and by category; `None`
        and empty where no answers are known), both as shares of 1 after `normalise`.
    """
    tokens = [answer.visual_tokens for answer in answers]
    agreeing = [
        normalise(answer.text) == normalise(other.text)
        for answer, other in zip(answers, baseline, strict=True)
    ]
    correct: dict[str | None, list[bool]] = {}
    for answer in answers:
        if answer.item.expected is not None:
            right = normalise(answer.text) == normalise(answer.item.expected)
            correct.setdefault(None, []).append(right)
            if answer.item.category is not None:
                correct.setdefault(answer.item.category, []).append(right)
    accuracy = {category: statistics.fmean(right) for category, right in correct.items()}
    return {
        "visual_tokens": {
            "mean": statistics.fmean(tokens),
            "min": min(tokens),
            "max": max(tokens),
        },
        "milliseconds": {stage: _median_ms(times, stage) for stage in STAGES},
        "kv_cache_bytes": statistics.fmean(answer.cache_bytes for answer in answers),
        "agreement": statistics.fmean(agreeing),
        "accuracy": accuracy.pop(None, None),
        "accuracy_by_category": accuracy,
    }


def _median_ms(times: Sequence[StageTimes], stage: str) -> float | None:
    seconds = [asdict(entry)[stage] for entry in times]
    return None if None in seconds or not seconds else 1000 * statistics.median(seconds)


def failures(items: Sequence[Item], failed: Mapping[int, str]) -> list[dict[str, Any]]:
    """The questions that were not asked, as results hold them.

    Args:
        items: All questions.
        failed: What is wrong with the pictures of some, by number.
    """
    return [
        {
            "question_id": items[number].question_id,
            "image": items[number].image,
            "modality": items[number].modality,
            "error": error,
        }
        for number, error in sorted(failed.items())
    ]


def failures_line(
    pictures: int, failed: Sequence[Mapping[str, Any]], could_not: str = "be read"
) -> str:
    """How many of so many pictures could not be read, and what is wrong with the first."""
    broken = len({(entry["image"], entry["modality"]) for entry in failed})
    if pictures == 1:
        which = f"the {failed[0]['modality']} could not {could_not}"
    elif broken < pictures:
        which = f"{broken} of {pictures} pictures could not {could_not}"
    else:
        which = f"none of the {pictures} pictures could {could_not}"
    more = f"; and {broken - 1} more" if broken > 1 else ""
    return f"{which}: {failed[0]['error']}{more}"
