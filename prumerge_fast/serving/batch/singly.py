"""A batch that fails as a whole, one by one: an item that fails alone is a row with its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from prumerge_fast.errors import PictureError, PruMergeError

T = TypeVar("T")
R = TypeVar("R")


def batch_or_singly(
    call: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
) -> list[R | PictureError]:
    """What `call` makes of the items, or of those for which it fails the error.

    Raises:
        PruMergeError: It fails for what all items have in common.
    """
    try:
        return [*call(items)]
    except PruMergeError:
        raise
    except Exception as error:  # out of memory, or whatever a model makes of what it is given
        if len(items) == 1:
            return [PictureError(f"expected an answer, got {type(error).__name__} ({error})")]
    # Out here, where the error no longer holds the tensors of the batch.
    return [result for item in items for result in batch_or_singly(call, [item])]
