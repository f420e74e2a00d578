"""`bench/end_to_end.py` on the demo model, and the shape that it times."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prumerge_fast.cli.inputs import InputError
from prumerge_fast.config import PruMergeConfig
from prumerge_fast.cost.shapes import LLAVA_1_5_7B

BENCH = Path(__file__).parents[1] / "bench"
SMALL = ("--model", "demo", "--precision", "float32", "--rounds", "2", "--new-tokens", "3")


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


@pytest.fixture
def end_to_end() -> ModuleType:
    return importlib.import_module("end_to_end")


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
        assert row["process_bytes_before"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_peak_of_the_process_is_of_the_call_alone(end_to_end):
    cpu, size = torch.device("cpu"), 1 << 28
    large = end_to_end.peak_memory(lambda: torch.ones(size, dtype=torch.uint8), cpu)
    small = end_to_end.peak_memory(lambda: None, cpu)
    for found, grown in ((large, size), (small, 0)):
        growth = found["peak_process_bytes"] - found["process_bytes_before"]
        assert growth == pytest.approx(grown, abs=1 << 25)


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


@pytest.mark.parametrize("content", ["{", "[]", "{}", None])
def test_output_that_is_no_result(end_to_end, tmp_path, monkeypatch, content):
    path = tmp_path / "result.json"
    path.mkdir() if content is None else path.write_text(content)
    monkeypatch.setattr(end_to_end, "_subject", None)  # nothing is loaded
    with pytest.raises(InputError, match=r"--output: expected a .*result\.json"):
        end_to_end.main([*SMALL, "--output", str(path)])


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
        (["--model", "gpt"], "invalid choice: 'gpt'"),
        (["--device", "cuda:99"], "--device: expected one of"),
    ],
)
def test_bad_options(tmp_path, arguments, says):
    command = [sys.executable, BENCH / "end_to_end.py", "--output", tmp_path / "x", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


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
