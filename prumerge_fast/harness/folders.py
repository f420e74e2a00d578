"""Which files of a folder are pictures or videos: what phones, Macs and Windows put there."""

from __future__ import annotations

from collections.abc import Iterable
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
    """Pictures, and why files that look like some are not among them.

    Args:
        images: In the order given; those of a folder by name.
        skipped: Names, by the reason.
    """

    images: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def remark(self) -> str:
        """What was skipped, in a line; empty for nothing."""
        parts = []
        for reason, names in self.skipped.items():
            more = len(names) - _MOST_NAMED
            listed = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
            parts.append(f"{listed} ({reason})")
        return f"skipped: {'; '.join(parts)}" if parts else ""


def find_images(paths: Iterable[Path]) -> Found:
    """The files themselves and, for each folder, the pictures right in it.

    Names may be in capitals. Hidden files are no pictures, whatever their suffix: a Mac leaves
    `._a.jpg` beside `a.jpg`; nor are the `~$` files of programs that have one open.

    Raises:
        InputError: A path does not exist, or a folder holds no picture that can be read.
    """
    found = Found()
    for path in paths:
        if path.is_dir():
            inside = _in_folder(path)
            if not inside.images:
                remark = inside.remark()
                raise InputError(
                    f"--images: expected a folder with images ({', '.join(_readable())}), "
                    f"got {path}, which holds none{remark and f'; {remark}'}"
                )
            found.images.extend(inside.images)
            for reason, names in inside.skipped.items():
                found.skipped.setdefault(reason, []).extend(names)
        elif path.is_file():
            found.images.append(path)
        else:
            raise InputError(f"--images: expected an existing file or folder, got {path}")
    return found


def find_videos(paths: Iterable[Path]) -> list[Path]:
    """The files themselves and, for each folder, the videos right in it that are not hidden.

    Raises:
        InputError: A path does not exist, or a folder holds no video.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.is_file():
                raise InputError(f"--videos: expected an existing file or folder, got {path}")
            found.append(path)
            continue
        inside = [
            one
            for one in sorted(path.iterdir())
            if one.suffix.lower() in VIDEO_SUFFIXES and one.is_file() and not _is_aside(one)
        ]
        if not inside:
            raise InputError(
                f"--videos: expected a folder with videos ({', '.join(VIDEO_SUFFIXES)}), "
                f"got {path}, which holds none"
            )
        found += inside
    return found


def _is_aside(path: Path) -> bool:
    """Whether a file is hidden, or another program's beside one that it has open."""
    return path.name.startswith((".", "~$"))


def _in_folder(folder: Path) -> Found:
    found = Found()
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix not in _FORMATS and suffix not in _UNREAD:
            continue
        if _is_aside(path) or path.is_dir():
            continue
        reason = _unreadable(path, suffix)
        if reason is None:
            found.images.append(path)
        else:
            found.skipped.setdefault(reason, []).append(path.name)
    return found


def _unreadable(path: Path, suffix: str) -> str | None:
    if not path.is_file():
        return "no file, or a link to none"
    if suffix in _UNREAD:
        return f"{suffix} is not supported"
    format = _FORMATS[suffix]
    return None if opens(format) else f"{suffix} {NEEDS.get(format, 'is not in this Pillow')}"


def _readable() -> list[str]:
    return [suffix for suffix, format in _FORMATS.items() if opens(format)]
