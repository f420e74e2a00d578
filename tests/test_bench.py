"""The benchmarks run, on the smallest case that a CPU takes."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"
CASE = "1-196-192-float32-prumerge-"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu")


def test_gpu_benchmark_on_a_cpu(gpu: ModuleType, tmp_path: Path) -> None:
    only = f"^{CASE}(torch|triton)$"
    path = gpu.main(["--device", "cpu", "--only", only, "--output", str(tmp_path)])
    result = json.loads(path.read_text())
    timed, skipped = result["cases"]
    assert 0 < timed["p20_ms"] <= timed["p50_ms"] <= timed["p80_ms"]
    assert timed["gb_per_s"] > 0
    assert "on the CPU" in skipped["skipped"]
    assert result["copy"]["gb_per_s"] > 0
    assert result["command"][2:4] == ["--device", "cpu"]


def test_no_such_case(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "nothing"])
    assert "no case's name matches 'nothing'" in capsys.readouterr().err


def test_matrix_is_collected_and_runs() -> None:
    command = ["pytest", BENCH / "bench_backends.py", "--benchmark-disable", "-q"]
    done = subprocess.run(
        [*command, "-k", f"{CASE}torch and not compiled"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
