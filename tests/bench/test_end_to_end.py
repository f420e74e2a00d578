"""`bench/end_to_end.py` on the demo model, and the shape that it times."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from prumerge_fast.cost.shapes import LLAVA_1_5_7B
from prumerge_fast.errors import InputError
from prumerge_fast.reduction.config import PruMergeConfig

BENCH = Path(__file__).parents[2] / "bench"
SMALL = ("--model", "demo", "--precision", "float32", "--rounds", "2", "--new-tokens", "3")


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


@pytest.fixture
def end_to_end() -> ModuleType:
    return importlib.import_module("end_to_end")


@pytest.fixture
def peak_memory() -> ModuleType:
    return importlib.import_module("peak_memory")


@pytest.fixture
def empty(end_to_end: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result file without rows, to which nothing is added."""
    path = tmp_path / "result.json"
    monkeypatch.setattr(end_to_end, "_subject", lambda *_: None)
    monkeypatch.setattr(end_to_end, "time_subject", lambda *_, **__: [])
    end_to_end.main([*SMALL, "--output", str(path)])
    return path


def test_rows_of_the_demo_model(end_to_end, tmp_path, capsys):
    path = tmp_path / "result.json"
    returned = end_to_end.main([*SMALL, "--batch-size", "2", "--output", str(path), "--json"])
    assert json.loads(path.read_text()) == returned == json.loads(capsys.readouterr().out)
    rows = {row["policy"]: row for row in returned["rows"]}
    assert list(rows) == ["LLaVA", "PruMerge", "PruMerge+", *(f"PruMerge, keep {n}" for n in
                                                              (32, 64, 144))]  # fmt: skip
    plain, budget = rows["LLaVA"], rows["PruMerge, keep 64"]
    assert plain["visual_tokens"] == {"mean": 196, "min": 196, "max": 196}
    assert budget["visual_tokens"] == {"mean": 65, "min": 65, "max": 65}
    assert plain["speedup"]["prefill"] == {"median": 1, "p25": 1, "p75": 1}
    assert plain["milliseconds"]["prune_merge"] is None
    assert plain["kv_cache_bytes"] > budget["kv_cache_bytes"]
    for row in rows.values():
        assert (row["batch_size"], row["decoder_layers"], row["of_layers"]) == (2, 4, 4)
        found = {k: v["median"] for k, v in row["milliseconds"].items() if v is not None}
        assert min(found.values()) > 0
        assert found["decode"] == pytest.approx(2 * found["decode_step"])
        # Medians of two rounds are means, so that sums hold.
        assert found["total"] == pytest.approx(found["first_token"] + found["decode"])
        assert row["peak_torch_bytes"] > row["torch_bytes_before"] > 0
        assert "memory_run" not in row
    share = importlib.import_module("end_to_end_tables").pruner_share
    assert share(plain) is None
    medians = budget["milliseconds"]
    assert share(budget) == medians["prune_merge"]["median"] / medians["vision"]["median"]


def known(hold: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Holds at most 9 MB that it allocated itself, 3 of them before it allocates the last."""
    first = torch.empty(1_000_000, dtype=torch.uint8)
    second = torch.empty(5_000_000, dtype=torch.uint8)
    if hold is not None:
        hold.clear()
    del first
    third = torch.empty(4_000_000, dtype=torch.uint8)
    del second, third
    return torch.empty(3_000_000, dtype=torch.uint8)


def test_peak_of_a_known_case(peak_memory):
    cpu, held = torch.device("cpu"), torch.empty(500, dtype=torch.uint8)
    expected = {"torch_bytes_before": 500, "peak_torch_bytes": 500 + 9_000_000}
    for _ in range(3):  # what an earlier call left behind is none of the next one's
        assert peak_memory.peak_memory(known, [held, held[:9]], cpu) == expected
    # What was there before counts to the end, also where the profiler has seen where it came from.
    hold: list[torch.Tensor] = []
    peak_memory.peak_memory(lambda: hold.append(torch.empty(7_000_000, dtype=torch.uint8)), [], cpu)
    found = peak_memory.peak_memory(lambda: known(hold), hold, cpu)
    assert found == {"torch_bytes_before": 7_000_000, "peak_torch_bytes": 16_000_000}


def test_what_is_held_before(peak_memory):
    model = torch.nn.BatchNorm1d(10, dtype=torch.float64)
    inner = SimpleNamespace(absmax=torch.zeros(3), code=torch.zeros(4))
    model.weight.quant_state = SimpleNamespace(absmax=torch.zeros(5), state2=inner, dtype=None)
    model.bias.data = model.running_mean  # shared, so counted once
    found = peak_memory.storage_bytes(peak_memory.tensors_of(model))
    assert found == 8 * (10 + 10 + 10 + 1) + 4 * (3 + 4 + 5)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_memory_of_the_demo_model(end_to_end, monkeypatch, precision):
    """It is less with fewer tokens, and the same in whatever order the policies run."""
    subject = end_to_end.demo(precision, torch.device("cpu"))
    ordered = end_to_end.memory_of_subject(subject, batch=2, new_tokens=3, tick=lambda: None)
    backwards = dict(reversed(end_to_end.POLICIES.items()))
    monkeypatch.setattr(end_to_end, "POLICIES", backwards)
    again = end_to_end.memory_of_subject(subject, batch=2, new_tokens=3, tick=lambda: None)
    assert list(again) == list(backwards)
    assert again == ordered
    peaks = {name: found["peak_torch_bytes"] for name, found in ordered.items()}
    del peaks["PruMerge+"]  # which may keep every token, and the supplement
    assert max(peaks, key=peaks.get) == "LLaVA"
    budgets = [peaks[f"PruMerge, keep {n}"] for n in (32, 64, 144)]
    assert budgets == sorted(budgets)
    assert budgets[-1] < peaks["LLaVA"]
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    assert all(found["torch_bytes_before"] > weights for found in ordered.values())


def test_memory_is_added_to_rows_that_lack_it(end_to_end, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    arguments = [*SMALL, "--batch-size", "1", "2", "--output", str(path)]
    timed = end_to_end.main(arguments)
    earlier = json.loads(path.read_text())
    for row in earlier["rows"][:6]:  # the batch of 1
        row["peak_torch_bytes"] = None
        del row["torch_bytes_before"]
    earlier["versions"]["torch"] = earlier["machine"]["platform"] = "another"
    path.write_text(json.dumps(earlier))
    monkeypatch.setattr(end_to_end, "time_subject", None)
    command = [*arguments, "--memory-only"]
    found = end_to_end.main(command)
    assert found["rows"] == [
        *({**row, "memory_run": 0} for row in timed["rows"][:6]),
        *timed["rows"][6:],
    ]
    (run,) = found["memory_runs"]
    assert run["command"] == ["python", "bench/end_to_end.py", *command]
    assert run["versions"] == timed["versions"]
    assert found["versions"] == earlier["versions"]  # still those of the times
    markdown = importlib.import_module("end_to_end_tables").markdown
    assert f"`--memory-only`, {run['date'][:10]}, torch {torch.__version__}" in markdown(found)
    assert "It is – where" in markdown(earlier)
    before = path.read_text()
    end_to_end.main(command)  # nothing is lacking
    assert path.read_text() == before
    earlier["machine"]["device"] = "a GPU"
    path.write_text(json.dumps(earlier))
    with pytest.raises(InputError, match=r"--device: expected .* a GPU, got cpu"):
        end_to_end.main(command)
    path.unlink()
    with pytest.raises(InputError, match="--output: expected results of an earlier run"):
        end_to_end.main(command)
    assert not path.exists()


def test_goes_on_from_its_file(end_to_end, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    output = ["--output", str(path)]
    first = end_to_end.main([*SMALL, "--batch-size", "1", *output])["rows"]
    timed = []
    real = end_to_end.time_subject
    monkeypatch.setattr(
        end_to_end, "time_subject", lambda *a, **k: timed.append(k["batch"]) or real(*a, **k)
    )
    rows = end_to_end.main([*SMALL, "--batch-size", "1", "2", *output])["rows"]
    assert timed == [2]
    assert rows[: len(first)] == first
    assert {row["batch_size"] for row in rows} == {1, 2}
    with pytest.raises(InputError, match=r"--output: expected a new file or one with settings"):
        end_to_end.main([*SMALL, "--rounds", "3", *output])


def test_other_numbers_of_layers_are_other_rows(end_to_end, tmp_path, monkeypatch):
    """Asked for by number they are timed anew; what fits by itself is taken as it was."""
    timed = []

    def time_subject(subject, *, batch, **_):
        timed.append((subject, batch))
        return [{"decoder_layers": subject, "batch_size": batch}]

    monkeypatch.setattr(end_to_end, "time_subject", time_subject)
    monkeypatch.setattr(end_to_end, "_subject", lambda *arguments: arguments[-1] or 5)
    monkeypatch.setattr(end_to_end, "summary", lambda _: "")
    arguments = ["--model", "llava-1.5-7b", "--precision", "float32", "--batch-size", "1", "1"]
    arguments += ["--output", str(tmp_path / "new" / "result.json")]
    for layers in (["--layers", "2"], ["--layers", "2"], ["--layers", "3"], []):
        rows = end_to_end.main([*arguments, *layers])["rows"]
    assert timed == [(2, 1), (3, 1)]
    assert [row["decoder_layers"] for row in rows] == [2, 3]


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "{}", "3", '{"rows": 3}', '{"rows": null}', '{"rows": {}}'),
        *('{"rows": [{}]}', '{"rows": []}', "[" * 100_000, None),
    ],
)
def test_output_that_is_no_result(end_to_end, tmp_path, monkeypatch, content):
    path = tmp_path / "result.json"
    path.mkdir() if content is None else path.write_text(content)
    monkeypatch.setattr(end_to_end, "_subject", None)  # nothing is loaded
    with pytest.raises(InputError, match=r"--output: expected a .*result\.json"):
        end_to_end.main([*SMALL, "--output", str(path)])


@pytest.mark.parametrize("rows", [[{}], [3], [None, {}], [{"model": "demo"}]])
def test_rows_that_are_none(end_to_end, empty, rows):
    empty.write_text(json.dumps({**json.loads(empty.read_text()), "rows": rows}))
    with pytest.raises(InputError, match=r"--output: expected a .*result\.json"):
        end_to_end.main([*SMALL, "--output", str(empty)])


def test_output_below_a_file(end_to_end, empty):
    with pytest.raises(InputError, match=r"--output: expected a file that can be written"):
        end_to_end.main([*SMALL, "--output", str(empty / "x.json")])


@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_full_disk(end_to_end, empty, monkeypatch, fails):
    """It says so in one line, and what the file held stays."""
    before = empty.read_text()
    real = getattr(Path, fails)

    def fail(path, *arguments, **_):
        real(path, arguments[0][:10]) if fails == "write_text" else None
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, fails, fail)
    with pytest.raises(InputError, match=r"--output: expected a file that can be written, .*space"):
        end_to_end.main([*SMALL, "--output", str(empty)])
    assert [path.name for path in empty.parent.iterdir()] == [empty.name]
    assert empty.read_text() == before


def test_weights_of_16_bits_are_gone_before_those_of_4_come(monkeypatch):
    subjects = importlib.import_module("subjects")
    alive = []

    class Model:
        def save_pretrained(self, folder):
            alive.append(weakref.ref(self))

        @classmethod
        def from_pretrained(cls, *_, **__):
            assert alive[0]() is None
            raise InterruptedError

    monkeypatch.setattr(subjects, "random_llava", lambda *_: Model())
    monkeypatch.setattr(subjects, "LlavaForConditionalGeneration", Model)
    with pytest.raises(InterruptedError):
        subjects.real_shape("nf4", torch.device("cpu"), 1)


def test_four_bits_without_bitsandbytes(end_to_end, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(end_to_end.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        end_to_end.main(["--precision", "nf4", "--output", str(tmp_path / "x")])
    assert "--precision: expected bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "33"], "--layers: expected at most 32, got 33"),
        (["--rounds", "1"], "--rounds: expected at least 2, got 1"),
        (["--batch-size", "0"], "expected a whole number >= 1, got 0"),
        (["--batch-size", "1", "9999999999999"], "--batch-size: expected at most 1024, got 99999"),
        (["--model", "gpt"], "--model: invalid choice: 'gpt'"),
    ],
)
def test_bad_options(end_to_end, capsys, arguments, says):
    with pytest.raises(SystemExit, match="2"):
        end_to_end.main(["--output", "x", *arguments])
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_bad_device_of_the_command(tmp_path):
    command = [sys.executable, BENCH / "end_to_end.py", "--device", "cuda:99"]
    command += ["--output", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("end_to_end.py: --device: expected one of")
    assert done.stderr.count("\n") == 1


def test_pruner_takes_less_than_a_percent_of_the_tower():
    """At ViT-L/14-336, as docs/end-to-end.md says."""
    tables = importlib.import_module("end_to_end_tables")
    result = json.loads((BENCH / "results" / "end-to-end-cpu.json").read_text())
    rows = [row for row in result["rows"] if row["model"] == "llava-1.5-7b"]
    shares = [share for share in map(tables.pruner_share, rows) if share is not None]
    assert len(shares) == 5 * len(rows) / 6 > 0
    assert min(shares) > 0
    assert max(shares) < 0.01


def test_committed_memory_is_less_with_fewer_tokens():
    result = json.loads((BENCH / "results" / "end-to-end-cpu.json").read_text())
    cells = {}
    for row in result["rows"]:
        name = tuple(row[key] for key in ("model", "precision", "batch_size"))
        cells.setdefault(name, {})[row["policy"]] = row["peak_torch_bytes"]
    for peaks in cells.values():
        budgets = [peaks[f"PruMerge, keep {n}"] for n in (32, 64, 144)]
        assert budgets == sorted(budgets)
        assert max(peaks, key=peaks.get) == "LLaVA"


def test_tables_with_and_without_the_spread_of_times(end_to_end):
    tables = importlib.import_module("end_to_end_tables")
    result = json.loads((BENCH / "results" / "end-to-end-cpu.json").read_text())
    result["rows"] = [row for row in result["rows"] if row["precision"] == "bfloat16"][-6:]
    times = result["rows"][1]["milliseconds"]["vision"]
    times |= {"median": 1234.4, "p25": 1200, "p75": 1300}
    whole, short = tables.markdown(result), tables.markdown(result, spreads_in="FILE")
    assert "| 1,234 ± 50 |" in whole
    assert "| 1,234 |" in short
    assert "±" not in short
    assert "how far they spread is in FILE" in short
    for text in (whole, short):
        assert re.search(r"\| prefill, times faster \| 1\.00 \(1\.00–1\.00\) \|", text)
        assert "medians of the stages do not add up" in text
        assert "without the preprocessing" in text
        assert "random weights" in text
    result["rows"] = [{**row, "model": "demo"} for row in result["rows"]]
    assert "random weights" not in tables.markdown(result)


def test_quartiles_of_ratios(end_to_end):
    assert end_to_end.ratio([2.0, 6.0, 8.0], [1.0, 2.0, 2.0]) == {
        "median": 3.0,
        "p25": 2.5,
        "p75": 3.5,
    }


def test_what_is_replayed_on_a_gpu(end_to_end):
    subject = end_to_end.demo("float32", torch.device("cpu"))
    inputs = subject.preprocess(0, 2)
    for config in (None, PruMergeConfig(keep=16)):
        found = end_to_end.replayed(subject.model, inputs, config)
        assert set(found) == {"vision", "prefill"}
        assert min(found.values()) > 0
    assert end_to_end.replayed(subject.model, inputs, PruMergeConfig()) is None


def test_real_shape_is_that_of_the_cost_model():
    subjects = importlib.import_module("subjects")
    with torch.device("meta"):
        model = subjects.random_llava(LLAVA_1_5_7B.decoder.layers)
    assert model.num_parameters() == LLAVA_1_5_7B.parameters
