"""A policy's answers on file, in the format of LLaVA's evaluation scripts, and taken up from there.

A question whose picture could not be read is not in the file: those scripts would take an empty
text for an answer. Questions stand in the order of the question file.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prumerge_fast.errors import InputError
from prumerge_fast.harness.answers import Answer
from prumerge_fast.harness.files import write_whole
from prumerge_fast.harness.inputs import Item
from prumerge_fast.harness.provenance import differences

_FIELDS = {"question_id": (int, str), "prompt": str, "text": str, "metadata": dict}
_METADATA = {
    "image": str,
    "visual_tokens": int,
    "kv_cache_bytes": (int, float),
    "settings": dict,
}


def line(answer: Answer, origin: Mapping[str, Any]) -> str:
    """An answer as it is written.

    Args:
        answer: Of one policy.
        origin: `model_id`, and under `settings` what else the answer depends on.
    """
    record = {
        "question_id": answer.item.question_id,
        "prompt": answer.item.text,
        "text": answer.text,
        "answer_id": uuid.uuid4().hex,
        "model_id": origin["model_id"],
        "metadata": {
            "image": answer.item.image,
            "visual_tokens": answer.visual_tokens,
            "kv_cache_bytes": answer.cache_bytes,
            "settings": origin["settings"],
        },
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def resumed(path: Path, items: Sequence[Item], origin: Mapping[str, Any]) -> dict[int, Answer]:
    """The answers on file by the number of their question, in the file's order.

    A last line that was not written to its end is cut off the file.

    Raises:
        InputError: A line (named by its number) is no answer, or one to another question or of
            another origin.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    unanswered: dict[tuple[Any, ...], list[int]] = {}
    for number, item in enumerate(items):
        unanswered.setdefault((item.question_id, item.image, item.text), []).append(number)
    expected = {"model_id": origin["model_id"], **origin["settings"]}
    done: dict[int, Answer] = {}
    for count, text in enumerate(whole.split(b"\n")[:-1], start=1):
        where = f"{path}:{count}"
        try:
            record = _checked(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"--resume: expected answers of `compare`, got {where} ({error})"
            ) from None
        metadata = record["metadata"]
        found = {"model_id": record.get("model_id"), **metadata["settings"]}
        different = differences(found, expected)
        if different:
            raise InputError(
                f"--resume: expected answers of a run with these settings, got {where} with "
                f"{different}; --overwrite starts anew"
            )
        numbers = unanswered.get((record["question_id"], metadata["image"], record["prompt"]))
        if not numbers:
            which = "none of them" if numbers is None else "answered before"
            raise InputError(
                f"--resume: expected one answer to each of these {len(items)} questions, got "
                f"{where} to question {record['question_id']!r} about {metadata['image']}, which "
                f"is {which}; --overwrite starts anew"
            )
        number = numbers.pop(0)
        done[number] = Answer(
            items[number], record["text"], metadata["visual_tokens"], metadata["kv_cache_bytes"]
        )
    if whole != content:
        os.truncate(path, len(whole))  # writes nothing, so a full disk loses nothing
    return done


def put_in_order(path: Path, numbers: Sequence[int]) -> None:
    """Sorts the lines of a file by their questions' numbers: LLaVA's script for POPE counts them.

    Raises:
        OSError: The file cannot be written; it is as it was.
    """
    if list(numbers) == sorted(numbers):
        return
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    ordered = [text for _, text in sorted(zip(numbers, lines, strict=True))]
    write_whole(path, "\n".join([*ordered, ""]), errors="strict")


def _checked(text: bytes) -> dict[str, Any]:
    """The record in a line; ValueError says what it lacks."""
    record = json.loads(text.decode())
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    _check_types(record, _FIELDS)
    _check_types(record["metadata"], _METADATA)
    return record


def _check_types(found: dict[str, Any], types: Mapping[str, Any]) -> None:
    for name, kind in types.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"expected {name}, got {found.get(name)!r}")
