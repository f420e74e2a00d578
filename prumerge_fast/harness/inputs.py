"""What the commands are given: images, videos and questions, read and checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prumerge_fast.errors import InputError
from prumerge_fast.harness.options import DEFAULT_FRAMES
from prumerge_fast.harness.pictures import read_image
from prumerge_fast.harness.videos import read_video

IMAGE_TOKEN = "<image>"  # where the image goes in a prompt, as LLaVA writes it
VIDEO_TOKEN = "<video>"


@dataclass(frozen=True)
class Item:
    """One question about one image or one video.

    Args:
        question_id: As in the question file; else the number of the question, from 0.
        image: The name of the image or video.
        load: Reads the image, as RGB; of a video its frames [F, height, width, 3]. Raises
            PictureError.
        text: The question, or a whole prompt where `verbatim`.
        expected: The right answer, where it is known.
        category: The kind of question, where the question file has one.
        verbatim: `text` holds the image or video token and is the prompt as it stands.
        modality: "image" or "video".
    """

    question_id: int | str
    image: str
    load: Callable[[], Any]
    text: str
    expected: str | None = None
    category: str | None = None
    verbatim: bool = False
    modality: str = "image"

    @property
    def picture(self) -> tuple[str, str]:
        """What it asks about: a file of one name may be asked about as image and as video."""
        return self.image, self.modality


def items_from_images(
    paths: Iterable[Path],
    prompts: list[str],
    videos: Iterable[Path] = (),
    frames: int = DEFAULT_FRAMES,
) -> list[Item]:
    """Every prompt about every image file, and about so many frames of every video file.

    Raises:
        InputError: A prompt is unusable.
    """
    for prompt in prompts:
        check_prompt(prompt, "--prompt")
    files = [(path, "image") for path in paths] + [(path, "video") for path in videos]
    pairs = [(*file, prompt) for file in files for prompt in prompts]
    return [
        Item(
            number,
            str(path),
            _reader(path, modality, frames),
            prompt,
            verbatim=IMAGE_TOKEN in prompt or VIDEO_TOKEN in prompt,
            modality=modality,
        )
        for number, (path, modality, prompt) in enumerate(pairs)
    ]


def items_from_jsonl(path: Path, folder: Path, frames: int = DEFAULT_FRAMES) -> list[Item]:
    """The questions of a file in LLaVA's own format: one JSON object a line.

    `question_id`, `image` (a path below `folder`; or `video`, of which so many `frames` are read)
    and `text` are required; `answer` or `label` (the right answer) and `category` are optional. An
    image or video token in `text` is dropped, as LLaVA does, because the prompt's format puts the
    image first.

    Raises:
        InputError: The file cannot be read or is empty, or a line (named by its number) is not in
            that format or names an image that does not exist.
    """
    try:
        # Not splitlines: JSON strings may hold characters that it takes for line ends.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--questions: expected a readable text file, got {path} ({error})"
        ) from None
    items = [
        _item(line, f"{path}:{number}", folder, frames)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not items:
        raise InputError(f"--questions: expected at least one question, got {path}, which is empty")
    return items


def _reader(path: Path, modality: str, frames: int) -> Callable[[], Any]:
    return partial(read_image, path) if modality == "image" else partial(read_video, path, frames)


def _item(line: str, where: str, folder: Path, frames: int) -> Item:
    try:
        record: Any = json.loads(line)
    # Beside JSONDecodeError: ValueError for a number and RecursionError for nesting without end.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected one JSON object a line, got {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
    modality = "video" if "video" in record else "image"
    if modality == "video" and "image" in record:
        raise InputError(f"{where}: expected either an image or a video, got both")
    missing = [name for name in ("question_id", modality, "text") if name not in record]
    if missing:
        raise InputError(
            f"{where}: expected the fields question_id, image and text, got none named "
            f"{' or '.join(missing)}"
        )
    for name, types in (("question_id", (int, str)), (modality, (str,)), ("text", (str,))):
        if not isinstance(record[name], types):
            raise InputError(
                f"{where}: expected {name} to be {' or '.join(t.__name__ for t in types)}, "
                f"got {record[name]!r}"
            )
    for name in ("question_id", "text", "answer", "label", "category"):
        check_unicode(str(record.get(name)), f"{where}: {name}")
    image = folder / record[modality]
    try:
        exists = image.is_file()
    except OSError:  # a name that no file can have
        exists = False
    if not exists:
        raise InputError(f"{where}: expected an existing {modality}, got {image}")
    expected = record.get("answer")
    if expected is None:  # no answer, or null for one
        expected = record.get("label")
    if isinstance(expected, (bool, dict, list)):  # as text, no answer would ever match it
        raise InputError(
            f"{where}: expected answer or label to be a str or a number, got {expected!r}"
        )
    category = record.get("category")
    return Item(
        question_id=record["question_id"],
        image=record[modality],
        load=_reader(image, modality, frames),
        text=record["text"].replace(IMAGE_TOKEN, "").replace(VIDEO_TOKEN, "").strip(),
        expected=None if expected is None else str(expected),
        category=None if category is None else str(category),
        modality=modality,
    )


def check_prompt(prompt: str, name: str) -> None:
    """Raises InputError, with `name`, for a prompt that is no text or has more than one picture."""
    check_unicode(prompt, name)
    count = prompt.count(IMAGE_TOKEN) + prompt.count(VIDEO_TOKEN)
    if count > 1:
        raise InputError(
            f"{name}: expected at most one {IMAGE_TOKEN} or {VIDEO_TOKEN}, got {count} in "
            f"{prompt!r}"
        )


def check_unicode(text: str, name: str) -> None:
    """Raises InputError for halves of surrogate pairs, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: expected Unicode text, got {text!r} ({error})") from None
