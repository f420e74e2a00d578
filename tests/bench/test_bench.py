"""The benchmarks run, on the smallest case that a CPU takes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prumerge_fast.errors import InputError

BENCH = Path(__file__).parents[2] / "bench"
CASE = "1-196-192-float32-prumerge-"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu")


@pytest.mark.skipif(os.name != "posix", reason="sends itself a signal")
@pytest.mark.parametrize("name", ["end_to_end", "report", "gpu", "static_report"])
def test_interrupted_while_it_imports(name: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, BENCH / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ends_of_scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(BENCH)
    script = importlib.import_module("script")
    monkeypatch.setattr(sys, "argv", ["/some/where/x.py", "--a"])

    def end(result: object) -> object:
        def main(arguments: list[str]) -> object:
            assert arguments == ["--a"]
            if isinstance(result, BaseException):
                raise result
            return result

        with pytest.raises(SystemExit) as ended:
            script.run(main)
        return ended.value.code

    assert end(None) == end(Path("x")) == 0
    assert end(1) == 1
    assert end(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    assert end(InputError("--a: expected b,\ngot c")) == 2
    assert capsys.readouterr().err == "x.py: --a: expected b, got c\n"
    assert end(FileNotFoundError(2, "No such file", "y")) == 2
    assert capsys.readouterr().err.startswith("x.py: expected a file that can be read or written")


def test_interrupts_that_are_ignored_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    script = importlib.import_module("script")
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        script.interruptible()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


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


def test_static_report_is_of_this_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails: `python bench/static_report.py && python bench/update_docs.py`."""
    monkeypatch.syspath_prepend(BENCH)
    static_report = importlib.import_module("static_report")
    result = json.loads((BENCH / "results" / "static-report.json").read_text())
    assert result["kernel_digest"] == static_report.kernel_digest()


def test_matrix_is_collected_and_runs() -> None:
    command = ["pytest", BENCH / "bench_backends.py", "--benchmark-disable", "-q"]
    done = subprocess.run(
        [*command, "-k", f"{CASE}torch and not compiled"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
