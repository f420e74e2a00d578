"""The rows that a batch job reads and writes: columns that never change, whatever the engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

ID = "id"  # by which Ray knows what is done

QUESTIONS = pa.schema(
    {
        ID: pa.string(),
        "image": pa.string(),  # as it was given
        "path": pa.binary(),  # absolute, as actors elsewhere open it; it need not be Unicode
        "prompt": pa.string(),
    }
)
ANSWERS = pa.schema(
    {
        ID: pa.string(),
        "image": pa.string(),
        "prompt": pa.string(),
        "answer": pa.string(),  # null where there is an error
        "error": pa.string(),  # null where there is an answer
        "visual_tokens": pa.int32(),  # of the image, that the language model saw
        "prompt_tokens": pa.int32(),  # those and the text's
    }
)


def question_id(path: str, prompt: str) -> str:
    """The same for the same question about the same file, in every run."""
    return hashlib.sha256(os.fsencode(f"{path}\0{prompt}")).hexdigest()[:24]


def readable(text: str) -> str:
    """Text with a name of a file in it, as UTF-8 can hold it."""
    return text.encode(errors="backslashreplace").decode()


def answers_table(questions: pa.Table, answers: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Questions with what came of them.

    Args:
        questions: As `QUESTIONS`.
        answers: Of each question `answer`, `visual_tokens` and `prompt_tokens`, or `error`.

    Returns:
        As `ANSWERS`.
    """
    columns = {name: questions[name] for name in (ID, "image", "prompt")}
    answers = [
        {**answer, "error": readable(answer["error"])} if answer.get("error") else answer
        for answer in answers
    ]
    for name in ANSWERS.names[len(columns) :]:
        columns[name] = pa.array([answer.get(name) for answer in answers], ANSWERS.field(name).type)
    return pa.table(columns, schema=ANSWERS)
