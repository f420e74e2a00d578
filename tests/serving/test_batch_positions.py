"""What `batch` refuses before Ray or an engine is there."""

from __future__ import annotations

from dataclasses import fields

import pytest

from prumerge_fast.errors import InputError
from prumerge_fast.serving.batch.options import BatchOptions


def test_positions_are_the_engines() -> None:
    given = {field.name: None for field in fields(BatchOptions)}
    for engine, positions in (("transformers", "original"), ("vllm", "compact")):
        chosen = {"positions": positions}
        assert BatchOptions(**{**given, "engine": engine, "chosen": chosen}).chosen is chosen
    with pytest.raises(InputError, match=r"^--positions: expected compact beside --engine vllm"):
        BatchOptions(**{**given, "engine": "vllm", "chosen": {"positions": "original"}})
