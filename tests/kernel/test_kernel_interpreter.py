"""`kernel_interpreter_cases.py`, in a process of its own: Triton reads TRITON_INTERPRET once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("kernel_interpreter_cases.py")


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreter_agrees(marker: str) -> None:
    done = subprocess.run(
        ["pytest", CASES, "-q", "-m", marker],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
