"""bench/measure.py: which results it makes, and that it neither loses nor repeats work."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measure(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "bench")
    module = importlib.import_module("measure")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.fixture
def steps(measure, monkeypatch, tmp_path):
    """Three quick steps, one for each way of leaving a result."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    (tmp_path / "write.py").write_text(
        "import sys, pathlib\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "if path.suffix:\n"
        "    path.write_text(path.read_text() + '+' if path.exists() else 'begun')\n"
        "else:\n"
        "    (path / 'result.json').write_text('in a folder')\n"
    )
    program = "python write.py {output}"
    made = (
        measure.Step("printed", ("python -c 'print(1)'",), captured=True),
        measure.Step("written", (program, program)),
        measure.Step("folder", (program,), made="result.json"),
    )
    monkeypatch.setattr(measure, "STEPS", made)
    return made


def contents(folder):
    return {path.stem: path.read_text().strip() for path in folder.glob("*.json")}


def test_every_result_has_its_step(measure):
    made = {step.result.name for step in measure.STEPS}
    assert made == {path.name for path in measure.RESULTS.glob("*.json")}


def test_committed_results_are_of_these_commands(measure):
    def commands(result):
        if isinstance(result, list):
            return {line for entry in result for line in commands(entry)}
        return {" ".join(result["command"])} if "command" in result else commands(result["rows"])

    def without_output(lines):
        return {re.sub(r" --output \S+", "", line) for line in lines}

    for step in measure.STEPS:
        result = json.loads(step.result.read_text())
        # pytest-benchmark's files and the one made of several runs name no command.
        if step.name not in ("prune-merge-cpu", "vision-cpu", "demo-quantised"):
            assert without_output(commands(result)) == without_output(step.lines()), step.name


def test_all_steps(measure, steps, tmp_path, capfd):
    assert measure.main([]) == 0
    assert contents(tmp_path) == {"printed": "1", "written": "begun+", "folder": "in a folder"}
    assert "== 3 of 3, folder" in capfd.readouterr().out
    assert not (tmp_path / "runs" / "measure").exists()  # so that the next call begins anew


def test_goes_on_after_a_failure(measure, steps, monkeypatch, tmp_path, capfd):
    printed, written, folder = steps
    fails = written._replace(commands=(*written.commands, "python -c 'raise SystemExit(3)'"))
    monkeypatch.setattr(measure, "STEPS", (printed, fails, folder))
    assert measure.main([]) == 3
    assert contents(tmp_path) == {"printed": "1"}
    assert "written: exit code 3; the same command goes on from here" in capfd.readouterr().out
    monkeypatch.setattr(measure, "STEPS", steps)
    assert measure.main([]) == 0
    assert contents(tmp_path)["written"] == "begun+++"  # the command was given what it had left
    assert "== 1 of 3, printed: done" in capfd.readouterr().out


def test_a_named_step_is_measured_again(measure, steps, tmp_path):
    for expected in ("begun+", "begun+"):
        assert measure.main(["written"]) == 0
        assert contents(tmp_path) == {"written": expected}
        (tmp_path / "written.json").unlink()


def test_unknown_step(measure, capsys):
    with pytest.raises(SystemExit, match="2"):
        measure.main(["cost", "nonsense"])
    assert "STEP: expected some of cost, static-report" in capsys.readouterr().err


def test_list_shows_whole_commands(measure, capsys):
    assert measure.main(["cost", "demo-accuracy", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "prumerge-fast cost --json --device V100" in shown
    assert "evaluate --output runs/measure/demo-accuracy/demo-accuracy.json" in shown
    assert "demo-finetune" not in shown
    assert sys.prefix not in shown
