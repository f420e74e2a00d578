"""Errors of a full disk, which name no file."""

import errno

# `EDQUOT`, a quota used up, is not on Windows.
NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
