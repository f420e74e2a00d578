"""Writing where there may be no room."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

# Errors of a full disk, which name no file. `EDQUOT`, a quota used up, is not on Windows.
NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


def write_whole(path: Path, text: str, errors: str) -> None:
    """Puts `text` in the place of what a file holds, or of a link's target: whole or not at all.

    Args:
        path: Of the file; its folder takes another beside it meanwhile.
        text: Written in UTF-8.
        errors: What becomes of characters that UTF-8 cannot hold, as `open` takes it.

    Raises:
        OSError: The file cannot be written; it is as it was.
    """
    target = path.resolve()
    part = target.with_name(f"{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors=errors)
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
