"""Answers on file: a header with all that they depend on, then a line for each batch."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prumerge_fast.errors import InputError
from prumerge_fast.harness.provenance import differences

_FORMAT = {"format": "prumerge-fast evaluate, answers 2"}
_START = json.dumps(_FORMAT)[:-1]  # of every file's first line


def answers_file(output: Path) -> Path:
    """Where the answers of a run are kept, to be resumed from."""
    return output.with_suffix(".answers.jsonl")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def resumed(
    path: Path, header: dict[str, Any], names: Sequence[str], sizes: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """The batches on file by number; the file is begun where it has no whole header.

    Args:
        path: Of the answers.
        header: What they depend on.
        names: Those of the policies.
        sizes: Questions of each batch.

    Raises:
        InputError: The file cannot be read or written, has another header, or is damaged.
    """
    header = {**_FORMAT, **header}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        start = _START.encode()
        if not whole and (start.startswith(content) or content.startswith(start)):
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return {}
        # Not splitlines: JSON strings may hold characters that it takes for line ends.
        first, *lines = whole.decode().split("\n")[:-1] or [content.decode()]
        found = json.loads(first)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--output: expected a writable file with answers of an earlier run or none beside it, "
            f"got {path} ({error})"
        ) from None
    is_header = isinstance(found, dict)
    different = (
        differences(found, header) if is_header else f"{type(found).__name__} for its header"
    )
    if different:
        raise InputError(
            f"--output: expected answers of a run with these settings, got {path} with "
            f"{different}; remove it to start anew"
        )
    done: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=2):
        try:
            batch = _checked(line, names, sizes)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"--output: expected whole answers of an earlier run, got {path}:{number} "
                f"({error}); remove that line to have its questions asked again"
            ) from None
        if not batch["failed"]:  # broken pictures are tried again, with their batch
            done.setdefault(batch["batch"], batch)  # two runs at once ask a batch twice
    if whole != content:  # an interrupted last line is asked again
        try:
            os.truncate(path, len(whole))  # writes nothing, so a full disk loses nothing
        except OSError as error:
            raise InputError(
                f"--output: expected a writable file with answers, got {path} ({error})"
            ) from None
    return done


def append(path: Path, batch: dict[str, Any]) -> None:
    """Adds a batch.

    Raises:
        InputError: There is no room, say. The batches before stay.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(
            f"--output: expected a file that takes more answers, got {path} ({error}); those before"
            " stay in it, and the same command goes on from them"
        ) from None


def _checked(line: str, names: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """A batch as it stands in a line; ValueError says what it lacks."""
    batch = json.loads(line)
    if not isinstance(batch, dict):
        raise ValueError(f"expected a JSON object, got {type(batch).__name__}")
    number = batch.get("batch")
    if type(number) is not int or not 0 <= number < len(sizes):
        raise ValueError(f"expected a batch from 0 to {len(sizes) - 1}, got {number!r}")
    datetime.datetime.fromisoformat(str(batch.get("date")))
    failed = batch.setdefault("failed", [])
    if not isinstance(failed, list) or len(failed) > sizes[number]:
        raise ValueError(f"expected a list of failures, got {failed!r}")
    size = sizes[number] - len(failed)
    for field, kind in (("texts", str), ("tokens", int)):
        entries = batch.get(field)
        if not isinstance(entries, dict) or entries.keys() != set(names):
            raise ValueError(f"expected {field} of each policy")
        for name, column in entries.items():
            if not isinstance(column, list) or [type(e) for e in column] != [kind] * size:
                raise ValueError(f"expected {size} {field} of {name}")
    return batch
