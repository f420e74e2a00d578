"""How the scripts of this folder begin, read and end.

Bad input ends them with exit code 2 and one line, Ctrl-C with exit code 130, like `prumerge-fast`.
What takes time to import is imported where it is used, so that `interruptible` comes early.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from prumerge_fast.errors import PruMergeError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def interruptible() -> None:
    """From here on Ctrl-C ends the process with exit code 130 and without a traceback.

    To be called before PyTorch and transformers are imported, which takes seconds.
    """
    # Anything else was set on purpose: a job in the background ignores Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))


def run(main: Callable[[list[str]], object]) -> NoReturn:
    """Calls `main` with the process's arguments and ends with the exit code that is due.

    That is what `main` returns, if it is a number.
    """
    try:
        code = main(sys.argv[1:])
    except PruMergeError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename is None:  # no file's: what went wrong is in the traceback
            raise
        _fail(f"expected a file that can be read or written, got {error}")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def read_result(option: str, path: Path) -> Any:
    """What a result file says.

    Raises:
        InputError: It cannot be read or is no JSON. Its message begins with `option`.
    """
    from prumerge_fast.errors import InputError

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last for nesting without end
        raise InputError(f"{option}: expected a result file (JSON), got {path} ({error})") from None


@contextmanager
def taking_apart(option: str, path: Path) -> Iterator[None]:
    """Around what uses a result file: one that is JSON but of another kind is bad input.

    Raises:
        InputError: The block met a value that is not there or not of its type.
    """
    from prumerge_fast.errors import InputError

    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise InputError(
            f"{option}: expected a result file of the right kind, got {path} "
            f"({type(error).__name__}: {error})"
        ) from error
