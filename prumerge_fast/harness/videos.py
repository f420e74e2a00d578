"""Videos: files, and frames sampled evenly from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prumerge_fast.errors import InputError, PictureError

VIDEO_SUFFIXES = (
    *(".3g2", ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".qt", ".webm", ".wmv"),
)


def read_video(path: Path, frames: int) -> np.ndarray:
    """Frames of a video, evenly spaced from its first to its last, as a person sees them.

    A rotation that the file asks for, as phones write it, is applied. A video of fewer frames than
    asked for has some of them twice.

    Args:
        path: Of the file.
        frames: F, how many.

    Returns:
        [F, height, width, 3] uint8, RGB.

    Raises:
        PictureError: There is no such file, or it is no video that can be decoded, or one without a
            frame.
        InputError: PyAV is not installed.
    """
    if not path.is_file():
        raise PictureError(f"expected an existing file, got {path}", "video")
    av = _pyav()
    try:
        count = sum(1 for _ in _decoded(av, path))  # what containers say of it may be wrong
        wanted = sampled(count, frames)
        pictures = {
            number: _upright(frame)
            for number, frame in enumerate(_decoded(av, path))
            if number in wanted
        }
    except (av.FFmpegError, OSError, ValueError) as error:
        raise PictureError(f"expected a readable video, got {path} ({error})", "video") from None
    if not pictures:
        raise PictureError(f"expected at least one frame, got {path}, which has none", "video")
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise PictureError(f"expected frames of one size, got several in {path}", "video")
    return np.stack([pictures[number] for number in wanted])


def sampled(count: int, frames: int) -> list[int]:
    """Which of `count` frames stand for a video: evenly from the first to the last."""
    return np.linspace(0, count - 1, frames).round().astype(int).tolist() if count else []


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise InputError(
            "--videos: expected PyAV to be installed, got none; "
            "run: pip install 'prumerge_fast[video]'"
        ) from None
    av.logging.set_level(None)  # what is wrong with a file is said once, by the error
    return av


def _decoded(av: Any, path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def _upright(frame: Any) -> np.ndarray:
    """[height, width, 3]; the frame's rotation is counter-clockwise, in degrees."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
