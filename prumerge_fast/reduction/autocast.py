"""Keeps autocast out of what is computed in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(
    device_type: str, *, even_if_off: bool = False
) -> AbstractContextManager[None]:
    """Autocast would run the similarities in half precision and so change the selection.

    Args:
        device_type: Of the tensors.
        even_if_off: For what is traced without autocast and may run with it.
    """
    if torch.amp.is_autocast_available(device_type) and (
        even_if_off or torch.is_autocast_enabled(device_type)
    ):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
