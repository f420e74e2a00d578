"""What is asked: a picture, the pictures of a folder, or a manifest's, each with every prompt."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prumerge_fast.errors import InputError
from prumerge_fast.harness.folders import find_images
from prumerge_fast.harness.inputs import check_prompt, check_unicode
from prumerge_fast.serving.batch.rows import ID, QUESTIONS, question_id, readable

MANIFESTS = (".jsonl", ".parquet")


def read_questions(
    images: Path, prompts: Sequence[str], image_folder: Path | None
) -> tuple[pa.Table, list[str]]:
    """The questions, each once, and what has to be said of those left out.

    A manifest's rows have an `image` (a path below `image_folder`) and may have a `prompt` of
    their own (or `text`, as question files of LLaVA call it), which then is the only one asked. A
    picture that does not exist is no error here: it is one of its row.

    Args:
        images: A picture, a folder (of which those in its folders too) or a manifest (.jsonl or
            .parquet).
        prompts: Asked about every picture without a prompt of its own.
        image_folder: Where a manifest's pictures are; `None`: beside the manifest.

    Returns:
        The questions as `QUESTIONS`, and remarks.

    Raises:
        InputError: There is no such thing, it holds no picture, or lacks a prompt; or a line or
            row of a manifest, named by its number from 1, is none.
    """
    for prompt in prompts:
        check_prompt(prompt, "--prompt")
    remarks = []
    if images.suffix.lower() in MANIFESTS and images.is_file():
        folder = (image_folder or images.parent).absolute()
        if not folder.is_dir():
            raise InputError(f"--image-folder: expected an existing folder, got {folder}")
        pairs = _of_manifest(images, prompts)
    elif image_folder is not None:
        raise InputError(
            f"--image-folder: expected a manifest ({' or '.join(MANIFESTS)}) as IMAGES, got "
            f"{images}"
        )
    else:
        if not prompts:
            raise InputError("--prompt: expected at least one, got none")
        found = find_images([images], argument="IMAGES", deep=True)
        if found.skipped:
            remarks.append(found.remark())
        folder = Path.cwd()
        pairs = ((str(path), prompt) for path in found.files for prompt in prompts)
    table, repeated = _table(pairs, folder)
    if not len(table):
        raise InputError(f"IMAGES: expected at least one picture, got {images}, which is empty")
    if repeated:
        remarks.append(f"asked once: {repeated} questions that {images} has more than once")
    return table, remarks


def _table(pairs: Iterable[tuple[str, str]], folder: Path) -> tuple[pa.Table, int]:
    """Questions as `QUESTIONS` from images and prompts, each once, and how many came again."""
    columns: dict[str, list[Any]] = {name: [] for name in QUESTIONS.names}
    known: set[str] = set()
    repeated = 0
    real = cache(os.path.realpath)  # of folders, of which there are few
    for image, prompt in pairs:
        path = (folder / image).absolute()
        # However the way to a picture is written, it has the answers of an earlier run.
        key = question_id(os.path.join(real(path.parent), path.name), prompt)
        if key in known:
            repeated += 1
            continue
        known.add(key)
        for name, value in (
            (ID, key),
            ("image", readable(image)),
            ("path", os.fsencode(path)),
            ("prompt", prompt),
        ):
            columns[name].append(value)
    return pa.table(columns, schema=QUESTIONS), repeated


def _of_manifest(path: Path, prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Image and prompt of each row, with every prompt where it has none of its own."""
    for where, image, own in _rows(path):
        if not isinstance(image, str) or not image or "\0" in image:
            raise InputError(f"{where}: expected image to be a path, got {reprlib.repr(image)}")
        check_unicode(image, f"{where}: image")
        if own is None:
            if not prompts:
                raise InputError(f"{where}: expected a prompt, there or as --prompt, got none")
            yield from ((image, prompt) for prompt in prompts)
        elif isinstance(own, str):
            check_prompt(own, f"{where}: prompt")
            yield image, own
        else:
            raise InputError(f"{where}: expected prompt to be a str, got {reprlib.repr(own)}")


def _rows(path: Path) -> Iterator[tuple[str, object, object]]:
    """Where it stands, image and prompt of each row."""
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _of_lines(path)
        else:
            yield from _of_parquet(path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"IMAGES: expected a readable manifest, got {path} ({error})") from None


def _of_lines(path: Path) -> Iterator[tuple[str, object, object]]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            # Beside JSONDecodeError: ValueError for a number and RecursionError for nesting.
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: expected one JSON object a line, got {error}") from None
            if not isinstance(record, dict):
                raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield where, record.get("image"), record.get(_prompt_of(record, where))


def _of_parquet(path: Path) -> Iterator[tuple[str, object, object]]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    prompt = _prompt_of(names, str(path))
    number = 0
    for batch in file.iter_batches(columns=[name for name in ("image", prompt) if name in names]):
        for record in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", record.get("image"), record.get(prompt)


def _prompt_of(names: Iterable[str], where: str) -> str:
    """What a manifest calls its prompts."""
    found = [name for name in ("prompt", "text") if name in names]
    if len(found) == 2:
        raise InputError(f"{where}: expected prompt or text, got both")
    return found[0] if found else "prompt"
