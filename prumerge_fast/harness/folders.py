"""Which files of a folder are pictures or videos: what phones, Macs and Windows put there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prumerge_fast.errors import InputError
from prumerge_fast.harness.pictures import HEIF, NEEDS, opens
from prumerge_fast.harness.videos import VIDEO_SUFFIXES

_SUFFIXES = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    HEIF: (".heic", ".heif", ".hif"),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pjp", ".pjpeg"),
    "JPEG2000": (".j2k", ".jp2", ".jpf", ".jpx"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
_FORMATS = {suffix: format for format, suffixes in _SUFFIXES.items() for suffix in suffixes}
# Pictures to a person, but to no decoder here.
_CAMERA_RAW = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".gpr", ".iiq", ".kdc"),
    *(".mef", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2"),
    *(".srf", ".srw", ".x3f"),
)
_UNREAD = frozenset(
    (
        *_CAMERA_RAW,
        *(".jxl", ".hdp", ".jxr", ".wdp"),  # JPEG XL and XR
        *(".ai", ".emf", ".eps", ".psd", ".svg", ".wmf", ".xcf"),
        *(".avifs", ".heics", ".heifs"),  # bursts of frames
    )
)
_MOST_NAMED = 3


@dataclass(frozen=True)
class Found:
    """Pictures or videos, and why files that look like some are not among them.

    Args:
        files: In the order given; those of a folder by name.
        skipped: Names, by the reason.
    """

    files: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def remark(self) -> str:
        """What was skipped, in a line; empty for nothing."""
        parts = []
        for reason, names in self.skipped.items():
            more = len(names) - _MOST_NAMED
            listed = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
            parts.append(f"{listed} ({reason})")
        return f"skipped: {'; '.join(parts)}" if parts else ""


def find_images(paths: Iterable[Path], *, argument: str = "--images", deep: bool = False) -> Found:
    """The files themselves and, for each folder, the pictures right in it.

    Names may be in capitals. Hidden files are no pictures, whatever their suffix: a Mac leaves
    `._a.jpg` beside `a.jpg`; nor are the `~$` files of programs that have one open.

    Args:
        paths: Of files and folders.
        argument: Which gave them, for the error.
        deep: The pictures in folders of a folder as well, but for hidden and linked folders.

    Raises:
        InputError: A path does not exist, or a folder holds no picture that can be read.
    """
    suffixes = {suffix: _unread(suffix) for suffix in (*_FORMATS, *_UNREAD)}
    return _find("images", argument, paths, suffixes, deep)


def find_videos(paths: Iterable[Path]) -> Found:
    """As `find_images`, the videos.

    Raises:
        InputError: A path does not exist, or a folder holds no video.
    """
    return _find("videos", "--videos", paths, dict.fromkeys(VIDEO_SUFFIXES))


def _find(
    kind: str,
    argument: str,
    paths: Iterable[Path],
    suffixes: Mapping[str, str | None],
    deep: bool = False,
) -> Found:
    """Files of one kind by their suffixes, each with the reason why it cannot be read, if any."""
    found = Found()
    for path in paths:
        if path.is_dir():
            inside = _in_folder(path, suffixes, deep)
            if not inside.files:
                readable = ", ".join(suffix for suffix, reason in suffixes.items() if not reason)
                remark = inside.remark()
                raise InputError(
                    f"{argument}: expected a folder with {kind} ({readable}), got {path}, which "
                    f"holds none{remark and f'; {remark}'}"
                )
            found.files.extend(inside.files)
            for reason, names in inside.skipped.items():
                found.skipped.setdefault(reason, []).extend(names)
        elif path.is_file():
            found.files.append(path)
        else:
            raise InputError(f"{argument}: expected an existing file or folder, got {path}")
    return found


def _in_folder(folder: Path, suffixes: Mapping[str, str | None], deep: bool) -> Found:
    found = Found()
    for path in _all_in(folder, found) if deep else sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix not in suffixes or _is_aside(path) or path.is_dir():
            continue
        reason = suffixes[suffix] if path.is_file() else "no file, or a link to none"
        if reason is None:
            found.files.append(path)
        else:
            found.skipped.setdefault(reason, []).append(path.name)
    return found


def _all_in(folder: Path, found: Found) -> Iterator[Path]:
    """The files of a folder and of those in it, by name, but for those of hidden folders.

    Links to folders, which may lead back here, go to what was `found` to be skipped.
    """

    def unreadable(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        if linked:
            found.skipped.setdefault("a link to a folder", []).extend(linked)
        yield from (Path(parent, name) for name in sorted(names))


def _is_aside(path: Path) -> bool:
    """Whether a file is hidden, or another program's beside one that it has open."""
    return path.name.startswith((".", "~$"))


def _unread(suffix: str) -> str | None:
    """Why pictures whose names end so cannot be read here; `None` where they can."""
    if suffix in _UNREAD:
        return f"{suffix} is not supported"
    format = _FORMATS[suffix]
    return None if opens(format) else f"{suffix} {NEEDS.get(format, 'is not in this Pillow')}"
